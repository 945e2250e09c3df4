"""Model and batch → one log-probability per response."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unidpo.model.attention import SegmentTable
from unidpo.model.head import capped, for_head, target_logps, token_logps
from unidpo.model.packs import Pack, PaddedRows


def response_logps(model: PreTrainedModel, batch: Pack | PaddedRows) -> Float[Tensor, " responses"]:
    """Log-probability of each response given its prompt and images, summed over its tokens, in nats.

    Logits are taken at response positions only and in float32 (float64 in a float64 model). Divide by
    `batch.response_tokens` for nats per token. Gradients flow where the model is trained.
    """
    with for_head(model) as weight:
        if isinstance(batch, Pack):
            return _of_pack(model, batch, weight)
        return _of_rows(model, batch, weight)


def _of_pack(model: PreTrainedModel, pack: Pack, weight: Tensor | None) -> Tensor:
    hidden = model.base_model(
        input_ids=pack.input_ids[None],
        # One axis is what plain rotary models take, (1, tokens); M-RoPE models take (3, 1, tokens).
        position_ids=pack.position_ids if len(pack.position_ids) == 1 else pack.position_ids[:, None],
        use_cache=False,
        segments=SegmentTable(pack.segments, pack.input_ids.device),
        **_images(pack),
    ).last_hidden_state[0]
    head, soft_cap = model.get_output_embeddings(), _soft_cap(model)
    values = token_logps(hidden[pack.predict_at], head, pack.targets, weight=weight, soft_cap=soft_cap)
    return _sum_by(pack.owner, values, len(pack.response_tokens))


def _of_rows(model: PreTrainedModel, rows: PaddedRows, weight: Tensor | None) -> Tensor:
    # Columns that predict a target in some row; prompts are left out where a model must compute its own logits.
    columns = rows.is_target[:, 1:].any(0).nonzero()[:, 0]
    is_target, targets = rows.is_target[:, columns + 1], rows.input_ids[:, columns + 1]
    inputs: dict[str, Any] = {
        "input_ids": rows.input_ids,
        "attention_mask": rows.attention_mask,
        "use_cache": False,
        **_images(rows),
    }
    if rows.vision or rows.features is not None:
        takes = inspect.signature(type(model.base_model).forward).parameters
        names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes]
        inputs |= dict.fromkeys(names, rows.mm_token_type_ids)
    if _head_is_known(model):
        hidden = model.base_model(**inputs).last_hidden_state[:, columns][is_target]
        head, soft_cap = model.get_output_embeddings(), _soft_cap(model)
        values = token_logps(hidden, head, targets[is_target], weight=weight, soft_cap=soft_cap)
    else:
        # The class's forward: on the instance `policy` may have put one that ends here.
        logits = type(model).forward(model, logits_to_keep=columns, **inputs).logits
        if logits.shape[1] != len(columns):  # a model that knows no `logits_to_keep` gives all of them
            logits = logits[:, columns]
        values = target_logps(logits[is_target], targets[is_target])
    return _sum_by(is_target.nonzero()[:, 0], values, len(rows.response_tokens))


def _images(batch: Pack | PaddedRows) -> dict[str, Any]:
    """A batch's images as the model's forward takes them."""
    if batch.features is None:
        return dict(batch.vision)
    return {**batch.vision, "mm_encoder_outputs": {"image": batch.features.as_output()}}


def _sum_by(owner: Tensor, values: Tensor, responses: int) -> Tensor:
    return values.new_zeros(responses, *values.shape[1:]).index_add(0, owner, values)


def _soft_cap(model: PreTrainedModel) -> float | None:
    """The bound that some models (Gemma 2) put on their logits, by the name transformers gives it."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


_KNOWN_HEADS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _head_is_known(model: PreTrainedModel) -> bool:
    """Whether the model's logits are what its head and soft cap make of its hidden states; tried once on two tokens.

    Some models (Cohere, Granite) scale their logits besides.
    """
    if model not in _KNOWN_HEADS:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        head = model.get_output_embeddings()
        was_training = model.training
        model.eval()  # without dropout, so that two forward passes are equal and no random number is drawn
        with torch.no_grad():
            own = type(model).forward(model, input_ids=ids, use_cache=False).logits
            hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            ours = None if hidden is None or head is None else capped(head(hidden), _soft_cap(model))
        model.train(was_training)
        _KNOWN_HEADS[model] = ours is not None and bool((ours - own).abs().max() <= 0.01 * own.abs().max())
    return _KNOWN_HEADS[model]
