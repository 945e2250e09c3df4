"""Model and batch → one log-probability per response."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from unidpo.packs import Pack, PaddedRows

# Bytes of float32 logits held at a time; the head's extra memory is a small multiple of this, whatever the batch.
LOGITS_CHUNK_BYTES = 256 * 2**20


def response_logps(model: PreTrainedModel, batch: Pack | PaddedRows) -> Float[Tensor, " responses"]:
    """Log-probability of each response given its prompt and images, summed over its tokens, in nats.

    Logits are taken at response positions only and in float32 (float64 in a float64 model). Divide by
    `batch.response_tokens` for nats per token. Gradients flow where the model is trained.
    """
    return _pack_logps(model, batch) if isinstance(batch, Pack) else _padded_logps(model, batch)


def _pack_logps(model: PreTrainedModel, pack: Pack) -> Float[Tensor, " responses"]:
    base = model.base_model
    inputs: dict[str, Any] = {}
    if pack.vision:
        inputs["mm_encoder_outputs"] = {"image": base.get_image_features(**pack.vision, return_dict=True)}
    hidden = base(
        input_ids=pack.input_ids[None],
        # One axis is what plain rotary models take, (1, tokens); M-RoPE models take (3, 1, tokens).
        position_ids=pack.position_ids if len(pack.position_ids) == 1 else pack.position_ids[:, None],
        use_cache=False,
        segments=pack.segments,
        **inputs,
    ).last_hidden_state[0]
    logps = token_logps(hidden[pack.predict_at], model.get_output_embeddings(), pack.targets)
    return torch.zeros(len(pack.response_tokens), dtype=logps.dtype, device=logps.device).index_add(
        0, pack.owner, logps
    )


def _padded_logps(model: PreTrainedModel, rows: PaddedRows) -> Float[Tensor, " responses"]:
    # Logits at the columns that predict a target in some row.
    predict_at = rows.is_target[:, 1:].any(0).nonzero()[:, 0]
    inputs = dict(rows.vision)
    if rows.vision:
        inputs["mm_token_type_ids"] = rows.mm_token_type_ids
    logits = model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        logits_to_keep=predict_at,
        use_cache=False,
        **inputs,
    ).logits
    if logits.shape[1] != len(predict_at):  # a model that knows no `logits_to_keep` gives all of them
        logits = logits[:, predict_at]
    is_target = rows.is_target[:, predict_at + 1]
    targets = rows.input_ids[:, predict_at + 1]
    logps = _full_precision(logits).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (logps * is_target).sum(-1)


def token_logps(
    hidden: Float[Tensor, "targets hidden"], head: torch.nn.Module, targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Log-probability of each target token, in nats, from the hidden state that predicts it.

    The vocabulary is met in chunks of `LOGITS_CHUNK_BYTES`; where there are several, a chunk's logits are computed
    again in the backward pass instead of being kept.
    """
    weight: Tensor = head.weight  # type: ignore[assignment]
    size = max(1, LOGITS_CHUNK_BYTES // (4 * len(weight)))
    if len(targets) <= size:
        return _chunk_logps(hidden, head, targets)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    return torch.cat([checkpoint(_chunk_logps, h, head, t, use_reentrant=False) for h, t in chunks])


def _chunk_logps(hidden: Tensor, head: torch.nn.Module, targets: Tensor) -> Tensor:
    logits = _full_precision(head(hidden))
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
