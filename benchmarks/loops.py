"""Padded training as others do it, in plain loops: chosen and rejected as rows, policy and reference run along.

DPO (arXiv:2305.18290, eq. 7) is written out here and shares no code with `unidpo.losses`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import Clock, First, Taken, taken
from benchmarks.settings import BETA, LEARNING_RATE, MAX_GRAD_NORM, Setting
from unidpo.data.pairs import PromptGroup
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_policy, load_processor
from unidpo.model.packs import PaddedRows, pad
from unidpo.model.parts import freeze, keep_trainable_in_float32
from unidpo.model.transfer import to_device

# Sums of log-probabilities, (rows,), and the logits where those of all positions are held.
RowLogps = Callable[[PreTrainedModel, PaddedRows], tuple[Tensor, Tensor | None]]


def full_logits(model: PreTrainedModel, rows: PaddedRows) -> tuple[Tensor, Tensor]:
    """Sum over each row's response from logits of all positions in float32, (rows,): as LLaMA-Factory does."""
    logits = model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        mm_token_type_ids=rows.mm_token_type_ids,
        use_cache=False,
        **rows.vision,
    ).logits.float()
    per_token = logits[:, :-1].log_softmax(-1).gather(2, rows.input_ids[:, 1:, None])[..., 0]
    return (per_token * rows.is_target[:, 1:]).sum(-1), logits


def selective(model: PreTrainedModel, rows: PaddedRows) -> tuple[Tensor, None]:
    """The same from logits of response positions alone: what TRL's kernel for GPUs computes."""
    hidden = model.base_model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        mm_token_type_ids=rows.mm_token_type_ids,
        use_cache=False,
        **rows.vision,
    ).last_hidden_state[:, :-1]
    is_target = rows.is_target[:, 1:]
    targets = rows.input_ids[:, 1:][is_target]
    logits = model.get_output_embeddings()(hidden[is_target]).float()
    per_token = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return per_token.new_zeros(len(is_target)).index_add(0, is_target.nonzero()[:, 0], per_token), None


def train_padded(setting: Setting, groups: Sequence[PromptGroup], row_logps: RowLogps) -> Taken:
    """AdamW on groups of one pair each, in order."""
    shape = setting.shape
    processor = load_processor(setting.model)
    policy, reference = (load_policy(setting.model, dtype=shape.dtype).to(shape.device) for _ in range(2))
    freeze(policy, ("vision", "projector"))
    reference.requires_grad_(False).eval()
    mixed = shape.dtype != torch.float32
    if mixed:
        keep_trainable_in_float32(policy)
    if shape.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    encoder = Encoder(processor, prompt_positions(policy), template="chatml")
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    clock = Clock(setting.watch)
    losses: list[float] = []
    first: dict[str, Any] = {}
    clock.on_train_begin()
    for step in range(setting.steps):
        seen = []
        total = 0.0
        of_step = groups[step * setting.pairs : (step + 1) * setting.pairs]
        for at in range(0, setting.pairs, shape.pairs_per_pass):
            encoded = [encoder.encode(group) for group in of_step[at : at + shape.pairs_per_pass]]
            rows = to_device(pad(encoded, pad_token_id=encoder.tokenizer.pad_token_id), torch.device(shape.device))
            precision = torch.autocast(shape.device, shape.dtype) if mixed else contextlib.nullcontext()
            with precision:  # the policy first, as TRL and LLaMA-Factory have it
                logps, logits = row_logps(policy, rows)
                with torch.no_grad():
                    ref_logps, _ = row_logps(reference, rows)
            # Each group has its better response wherever the data put it.
            better = torch.tensor([group.pairs[0].chosen for group in of_step[at : at + len(encoded)]])
            chosen = 2 * torch.arange(len(encoded)) + better
            rejected = 2 * torch.arange(len(encoded)) + 1 - better
            ratio = logps - ref_logps
            loss = -F.logsigmoid(BETA * (ratio[chosen] - ratio[rejected])).sum() / setting.pairs
            if logits is not None:
                assert math.isfinite(logits.mean())  # LLaMA-Factory logs their mean
                logits = None
            loss.backward()
            total += float(loss.detach())
            seen.append(torch.stack([logps[chosen], logps[rejected]]).detach())
        norm = torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        clock.on_pre_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
        losses.append(total)
        if not first:
            chosen_logps, rejected_logps = torch.cat(seen, dim=1).mean(1).tolist()
            first |= {"grad_norm": float(norm), "chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    return taken(clock, First(loss=losses[0], **first), losses, setting.pairs)
