"""Encoded groups → what one forward pass takes: a pack, or padded rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unidpo.data.pairs import Pair, PromptGroup
from unidpo.model.attention import Segment, Table
from unidpo.model.encode import EncodedGroup
from unidpo.model.features import ImageFeatures, join, without_pixels
from unidpo.model.tower import Tower
from unidpo.model.transfer import ON_HOST

P = TypeVar("P", bound="Pack | PaddedRows")


@dataclass(frozen=True, slots=True)
class Pack:
    """Whole groups in a single row without padding.

    Attributes:
        input_ids: prompt, response, response, next prompt, ...
        position_ids: every response of a group continues from the end of its prompt.
        segments: one per group, in order; `attention` reads who sees whom from them.
        kernel: what the attention backend's `table` makes of the segments; `None` where it has none.
        vision: image tensors of all groups, each image once.
        vision_on_host: what of them stays on the host, and what the tower makes of sizes alone, see `tower`.
        features: of the images, in the order of their tokens; takes the place of pixels in `vision`.
        predict_at: for every response token, in order, the position whose output predicts it: the position before
            it, which for a response's first token is the last one of its prompt.
        targets: the response tokens themselves.
        owner: which response of the pack each target belongs to.
        response_tokens: targets per response.
    """

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, "axes tokens"]
    segments: tuple[Segment, ...]
    vision: Mapping[str, Tensor]
    predict_at: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    response_tokens: Int[Tensor, " responses"]
    features: ImageFeatures | None = None
    kernel: Any = None
    vision_on_host: Mapping[str, Any] = field(default_factory=dict, metadata=ON_HOST)


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """One row per response, prompt and images repeated, padded on the right: what every transformers model takes.

    Attributes:
        input_ids, attention_mask, mm_token_type_ids: as the model's forward takes them.
        vision, vision_on_host: as of a `Pack`, each image once per row it stands in.
        position_ids: of models with M-RoPE, whose forward would look for the images in each row; `None` elsewhere.
        features: as of a `Pack`, once per row too.
        predict_at, targets, owner, response_tokens: as of a `Pack`, with the rows laid one after another.
        columns: those that predict a target in some row, for models that must compute their own logits.
        kept_at: `predict_at` where these columns alone are kept.
    """

    input_ids: Int[Tensor, "responses width"]
    attention_mask: Int[Tensor, "responses width"]
    mm_token_type_ids: Int[Tensor, "responses width"]
    position_ids: Int[Tensor, "axes responses width"] | None
    vision: Mapping[str, Tensor]
    predict_at: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    response_tokens: Int[Tensor, " responses"]
    columns: Int[Tensor, " columns"]
    kept_at: Int[Tensor, " targets"]
    features: ImageFeatures | None = None
    vision_on_host: Mapping[str, Any] = field(default_factory=dict, metadata=ON_HOST)

    @property
    def is_target(self) -> Bool[Tensor, "responses width"]:
        """Marks the response tokens."""
        marks = torch.zeros_like(self.input_ids, dtype=torch.bool)
        marks.view(-1)[self.predict_at + 1] = True
        return marks


@dataclass(frozen=True, slots=True)
class PairIndex:
    """The pairs of a batch, as indices into its responses.

    Attributes:
        chosen, rejected: response of the batch.
        chosen_scores, rejected_scores: float64, as in the data; NaN where it has none.
        rows: row of the data file, from 1.
        files: the data file of each row, where the reader noted one.
        source_chosen, source_rejected: which response of its own group in the data set each one is.
    """

    chosen: Int[Tensor, " pairs"]
    rejected: Int[Tensor, " pairs"]
    chosen_scores: Float[Tensor, " pairs"]
    rejected_scores: Float[Tensor, " pairs"]
    rows: tuple[int, ...]
    files: tuple[str | None, ...]
    source_chosen: tuple[int, ...]
    source_rejected: tuple[int, ...]


Collate: TypeAlias = Callable[[Sequence[EncodedGroup]], Pack | PaddedRows]
"""How encoded groups become what one forward pass takes: `pack`, or `pad` with a padding token."""


def pack(groups: Sequence[EncodedGroup], *, table: Table | None = None, tower: Tower | None = None) -> Pack:
    """Lay groups one after another in a single row.

    Args:
        table: of the attention backend, see `attention.Backend`.
        tower: the model's, for what it makes of the images' sizes; `None` to leave that to it.
    """
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    predict_at: list[Tensor] = []
    segments: list[Segment] = []
    at = 0
    for group in groups:
        lengths = tuple(len(response) for response in group.response_ids)
        segments.append(Segment(at, len(group.prompt_ids), lengths))
        ids.append(group.prompt_ids)
        positions.append(group.position_ids)
        at += len(group.prompt_ids)
        end_of_prompt = at - 1
        for response in group.response_ids:
            ids.append(response)
            steps = torch.arange(len(response))
            positions.append(_positions(group, response))
            predict_at.append(torch.where(steps == 0, end_of_prompt, at - 1 + steps))
            at += len(response)
    vision, on_host = split_vision([group.vision for group in groups], tower)
    responses = [response for group in groups for response in group.response_ids]
    response_tokens = torch.tensor([len(response) for response in responses])
    return Pack(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        segments=tuple(segments),
        kernel=None if table is None else table(segments),
        vision=vision,
        vision_on_host=on_host,
        features=_join_features(groups),
        predict_at=torch.cat(predict_at),
        targets=torch.cat(responses),
        owner=torch.repeat_interleave(torch.arange(len(responses)), response_tokens),
        response_tokens=response_tokens,
    )


def pad(groups: Sequence[EncodedGroup], *, pad_token_id: int, tower: Tower | None = None) -> PaddedRows:
    """One row per response, its prompt before it, padded on the right. `tower` as for `pack`."""
    rows = [(group, response) for group in groups for response in group.response_ids]
    ids = [torch.cat([group.prompt_ids, response]) for group, response in rows]
    types = [torch.cat([group.mm_token_type_ids, torch.zeros_like(response)]) for group, response in rows]
    prompts = torch.tensor([len(group.prompt_ids) for group, _ in rows])
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    inside = torch.arange(width) < lengths[:, None]
    is_target = inside & (torch.arange(width) >= prompts[:, None])
    some_target = is_target.any(0)
    at = is_target.view(-1).nonzero()[:, 0]
    input_ids = _pad_right(ids, pad_token_id)
    vision, on_host = split_vision([group.vision for group, _ in rows], tower)
    positions = [torch.cat([group.position_ids, _positions(group, response)], dim=1).T for group, response in rows]
    return PaddedRows(
        input_ids=input_ids,
        attention_mask=inside.long(),
        mm_token_type_ids=_pad_right(types, 0),
        position_ids=_pad_right(positions, 0).permute(2, 0, 1) if positions[0].shape[1] > 1 else None,
        vision=vision,
        vision_on_host=on_host,
        features=_join_features([group for group, _ in rows]),
        predict_at=at - 1,
        targets=input_ids.view(-1)[at],
        owner=at // width,
        response_tokens=lengths - prompts,
        columns=some_target.nonzero()[:, 0] - 1,
        kept_at=at // width * some_target.sum() + (some_target.cumsum(0) - 1)[at % width],
    )


def _positions(group: EncodedGroup, response: Tensor) -> Int[Tensor, "axes response"]:
    """Of a response: every one of a group continues from the end of its prompt."""
    return (group.next_position + torch.arange(len(response))).expand(len(group.position_ids), -1)


def used_responses(pairs: Sequence[Pair]) -> list[int]:
    """The responses that pairs of one group name, in the group's order, each once."""
    return sorted({index for pair in pairs for index in (pair.chosen, pair.rejected)})


def index_pairs(batch: Sequence[tuple[PromptGroup, Sequence[Pair]]]) -> PairIndex:
    """Index pairs into a batch that holds, group after group, the `used_responses` of the pairs given with it."""
    places: list[tuple[int, int]] = []
    scores: list[tuple[float, ...]] = []
    offset = 0
    for group, pairs in batch:
        used = used_responses(pairs)
        at = {index: offset + place for place, index in enumerate(used)}
        offset += len(used)
        for pair in pairs:
            places.append((at[pair.chosen], at[pair.rejected]))
            both = (group.responses[pair.chosen].score, group.responses[pair.rejected].score)
            scores.append(tuple(float("nan") if score is None else score for score in both))
    chosen, rejected = torch.tensor(places, dtype=torch.long).view(-1, 2).unbind(1)
    chosen_scores, rejected_scores = torch.tensor(scores, dtype=torch.float64).view(-1, 2).unbind(1)
    indexed = [pair for _, pairs in batch for pair in pairs]
    return PairIndex(
        chosen,
        rejected,
        chosen_scores,
        rejected_scores,
        rows=tuple(pair.row for pair in indexed),
        files=tuple(None if pair.file is None else str(pair.file) for pair in indexed),
        source_chosen=tuple(pair.chosen for pair in indexed),
        source_rejected=tuple(pair.rejected for pair in indexed),
    )


def with_features(batch: P, features: ImageFeatures) -> P:
    """The batch with features of its images in place of their pixels."""
    return replace(batch, vision=without_pixels(batch.vision), features=features)


def _join_features(groups: Sequence[EncodedGroup]) -> ImageFeatures | None:
    features = join([group.features for group in groups if group.features is not None])
    if features is not None and any(group.vision and group.features is None for group in groups):
        raise ValueError("groups with features of their images and groups with pixels do not go into one batch")
    return features


def split_vision(
    vision: Sequence[Mapping[str, Tensor]], tower: Tower | None
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Image tensors as one, with what the tower makes of their sizes: for the device, and for the host."""
    joined = join_vision(vision)
    if tower is None or "image_grid_thw" not in joined:
        return joined, {}
    grid = {"image_grid_thw": joined.pop("image_grid_thw")}
    if not joined:  # the tower is not asked
        return {}, grid
    tables, on_host = tower.tables(grid["image_grid_thw"])
    return joined | tables, grid | on_host


def images_of(batch: Pack | PaddedRows) -> dict[str, Any]:
    """What `get_image_features` takes of a batch; empty where it has no pixels."""
    return {} if batch.features is not None else {**batch.vision, **batch.vision_on_host}


def join_vision(vision: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Image tensors one after another.

    Where groups differ beyond the first axis (tiles per image, images per prompt, height and width), zeros fill up to
    the largest, as image processors do within a batch; the models leave such padding out.
    """
    names = sorted({name for tensors in vision for name in tensors})
    return {name: _concatenate_padded([tensors[name] for tensors in vision if name in tensors]) for name in names}


def _concatenate_padded(tensors: Sequence[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [most - size for most, size in zip(largest, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [side for count in reversed(missing) for side in (0, count)]))
    return torch.cat(padded)


def _pad_right(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
