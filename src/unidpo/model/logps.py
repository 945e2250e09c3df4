"""Model and batch → one log-probability per response."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from unidpo.model.attention import SegmentTable
from unidpo.model.features import image_features, without_pixels
from unidpo.model.head import capped, for_head, target_logps, token_logps
from unidpo.model.packs import Pack, PaddedRows, images_of
from unidpo.model.pixels import with_pixels


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
        segments=SegmentTable(pack.segments, pack.input_ids.device, pack.kernel),
        **_images(model, pack),
    ).last_hidden_state[0]
    head, soft_cap = model.get_output_embeddings(), _soft_cap(model)
    values = token_logps(hidden[pack.predict_at], head, pack.targets, weight=weight, soft_cap=soft_cap)
    return _sum_by_response(values, pack)


def _of_rows(model: PreTrainedModel, rows: PaddedRows, weight: Tensor | None) -> Tensor:
    inputs: dict[str, Any] = {
        "input_ids": rows.input_ids,
        "attention_mask": rows.attention_mask,
        "use_cache": False,
        **_images(model, rows),
    }
    if rows.position_ids is not None:
        inputs["position_ids"] = rows.position_ids
    if rows.vision or rows.features is not None:
        takes = inspect.signature(type(model.base_model).forward).parameters
        names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes]
        inputs |= dict.fromkeys(names, rows.mm_token_type_ids)
    if _head_is_known(model):
        hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)[rows.predict_at]
        head, soft_cap = model.get_output_embeddings(), _soft_cap(model)
        values = token_logps(hidden, head, rows.targets, weight=weight, soft_cap=soft_cap)
    else:
        # The class's forward: on the instance `policy` may have put one that ends here.
        logits = type(model).forward(model, logits_to_keep=rows.columns, **inputs).logits
        # A model that knows no `logits_to_keep` gives all of them.
        at = rows.kept_at if logits.shape[1] == len(rows.columns) else rows.predict_at
        values = target_logps(logits.flatten(0, 1)[at], rows.targets)
    return _sum_by_response(values, rows)


def _images(model: PreTrainedModel, batch: Pack | PaddedRows) -> dict[str, Any]:
    """A batch's images as the model's forward takes them."""
    features, images = batch.features, images_of(batch)
    if features is None and batch.vision_on_host:
        # What the tower is given besides the images would go on through the layers of the language model.
        features = image_features(model, images)
    if features is None:
        return with_pixels(images)
    sizes = without_pixels({**batch.vision, **batch.vision_on_host})
    return {**sizes, "mm_encoder_outputs": {"image": features.as_output()}}


def _sum_by_response(values: Float[Tensor, " targets"], batch: Pack | PaddedRows) -> Float[Tensor, " responses"]:
    sums: Tensor = _SumByResponse.apply(values, batch.owner, batch.response_tokens)  # type: ignore[no-untyped-call]
    return sums


class _SumByResponse(torch.autograd.Function):
    """Sums in the order of the tokens: on a GPU `index_add` would add them as they come."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, owner: Tensor, response_tokens: Tensor) -> Tensor:
        ctx.owner = owner
        starts = F.pad(response_tokens.cumsum(0), (1, 0))
        order = torch.arange(len(values), device=values.device)
        return F.embedding_bag(order, values[:, None], starts, mode="sum", include_last_offset=True)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.owner), None, None


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
