"""Packs or padded rows: what a model can take, found out by running both once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch

from unidpo.attention import PACK_ATTENTION, PackAttentionError
from unidpo.encode import EncodedGroup, Encoder
from unidpo.errors import ModelError, UserError
from unidpo.packs import Layout, pack, pad, to_device
from unidpo.pairs import PromptGroup
from unidpo.policy import Policy
from unidpo.ranks import gather

_LOG = logging.getLogger(__name__)
Attention: TypeAlias = Literal["auto", "sdpa", "padded"]
# Largest difference between the two paths, in nats per token, that rounding explains, by the type of the arithmetic.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# bitsandbytes rounds the inputs of each layer to 8 bits too; how coarsely depends on what else is in the batch.
_TOLERANCE_8_BIT = 0.1


def padded_rows(encoder: Encoder) -> Layout:
    """The layout with one padded row per response."""
    return functools.partial(pad, pad_token_id=encoder.tokenizer.pad_token_id or 0)


def choose_layout(
    policy: Policy,
    encoder: Encoder,
    group: EncodedGroup,
    *,
    attention: Attention,
    arithmetic: torch.dtype,
    device: torch.device,
) -> Layout:
    """`pack` if the model's log-probabilities of a group's responses are those of padded rows, else `padded_rows`.

    Leaves the model with its own attention. Every process must call it; all come to the same answer.

    Args:
        group: a small one, with an image where the data has any.
        attention: `"auto"`, `"sdpa"` (packs or an error), `"padded"` (no packs).
        arithmetic: what the model computes in.

    Raises:
        ModelError: packs are demanded and do not work.
    """
    padded = padded_rows(encoder)
    if attention == "padded":
        return padded
    own_attention = policy.attention
    tolerance = _TOLERANCE_8_BIT if getattr(policy.plain, "is_loaded_in_8bit", False) else _TOLERANCE[arithmetic]
    try:
        difference = _difference(policy, group, padded, own_attention, device)
        problem = None if difference <= tolerance else f"log-probabilities differ by {difference:.2g} nats per token"
    except Exception as error:
        # Whatever a foreign model does not understand about packs, the padded path is the answer.
        problem = str(error) or type(error).__name__
        _LOG.debug("packs failed", exc_info=True)
    finally:
        policy.set_attention(own_attention)
    problem = next(filter(None, gather([problem])), None)
    if problem is None:
        return pack
    if attention != "auto":
        raise ModelError(
            f"model.attention={attention}: packs do not work with this model ({problem}); set model.attention=padded"
        )
    _LOG.warning("packs do not work with this model (%s); using the slower padded path", problem)
    return padded


def _difference(policy: Policy, group: EncodedGroup, padded: Layout, own_attention: str, device: torch.device) -> float:
    """Largest difference between the two paths over a group's responses, in nats per token."""
    config = policy.plain.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise PackAttentionError(f"its attention layers are {', '.join(sorted(kinds))}")
    means = []
    for layout, attention in ((padded, own_attention), (pack, PACK_ATTENTION)):
        policy.set_attention(attention)
        batch = to_device(layout([group]), device)
        with policy.measuring():
            means.append(policy.response_logps(batch) / batch.response_tokens)
    return float((means[0] - means[1]).abs().max())


def smallest(groups: Sequence[PromptGroup], encoder: Encoder) -> EncodedGroup:
    """The group to try a model on: one with an image where there is any, then the least text.

    Groups that cannot be read any more are passed over; their rows are told of where they are met.

    Raises:
        UserError: none can be read.
    """
    problem: UserError | None = None
    for group in sorted(groups, key=_size):
        try:
            return encoder.encode(group)
        except UserError as error:
            problem = problem or error
    raise problem or ValueError("no groups")


def _size(group: PromptGroup) -> tuple[bool, int]:
    text = [message.text for message in group.messages] + [response.text for response in group.responses]
    return not group.images, sum(map(len, text))
