"""What a vision tower derives from the sizes of its images, made on the host where a batch is made.

On a GPU each look at these sizes makes the host wait, in some towers three times a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

_POSITIONS, _LENGTHS = "get_vision_position_ids", "get_vision_attention_seqlens"
_WINDOWS, _RESAMPLED = "get_vision_window_index", "get_vision_interpolation_indices_and_weights"
_SIZES = ("spatial_merge_size", "window_size", "patch_size", "num_grid_per_side")
_RESAMPLING = ("interpolation_mode", "interpolation_align_corners")
_TABLES = ("position_ids", "window_index", "interp_indices", "interp_weights")
_STARTS = ("cu_seqlens", "cu_window_seqlens")
_LONGEST = ("max_seqlen", "max_window_seqlen")
TOWER_INPUTS = frozenset(f"image_{name}" for name in (*_TABLES, *_STARTS, *_LONGEST))
"""Keyword arguments of `get_image_features` that stand for what a tower would make itself (transformers'
`accepts_precomputed_kwargs`)."""


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower as far as the sizes of its images go; goes to the loader's workers.

    Attributes:
        helpers: transformers' functions that the tower calls, by name.
        sizes: what it gives them.
        flash: whether its attention is FlashAttention, which wants starts of sequences on the device.
    """

    helpers: Mapping[str, Callable[..., Any]]
    config: Any
    sizes: Mapping[str, Any]
    flash: bool

    def tables(self, grid: Int[Tensor, "images 3"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What goes to the device and what stays on the host, by the names of `TOWER_INPUTS`.

        Args:
            grid: time, height and width of each image, in patches.
        """
        sizes, merge = self.sizes, self.sizes["spatial_merge_size"]
        tables = {"position_ids": self.helpers[_POSITIONS](grid, merge)}
        starts = {"cu_seqlens": self.helpers[_LENGTHS](grid, self.config)[0]}
        if _WINDOWS in self.helpers:
            windows = self.helpers[_WINDOWS](grid, merge, sizes["window_size"], sizes["patch_size"])
            tables["window_index"], starts["cu_window_seqlens"] = windows
        if _RESAMPLED in self.helpers:
            options = {name.removeprefix("interpolation_"): sizes[name] for name in _RESAMPLING}
            resampled = self.helpers[_RESAMPLED](grid, sizes["num_grid_per_side"], spatial_merge_size=merge, **options)
            tables["interp_indices"], tables["interp_weights"] = resampled
        host: dict[str, Any] = starts
        if self.flash:
            tables |= starts
            longest = dict(zip(_STARTS, _LONGEST, strict=True))
            host = {longest[name]: int(each.diff().max()) for name, each in starts.items()}
        return {f"image_{name}": t for name, t in tables.items()}, {f"image_{name}": t for name, t in host.items()}


def tower_of(model: PreTrainedModel) -> Tower | None:
    """The model's vision tower, where it takes from outside all that it derives from its images' sizes; else `None`.

    Whether its forward makes the same of it is for the caller to try.
    """
    tower = model.get_encoder(modality="image")
    # The functions that a tower's module imports are those that the tower calls.
    imported = vars(sys.modules[type(tower).__module__])
    helpers = {name: made for name, made in imported.items() if name.startswith("get_vision_")}
    needed = {_POSITIONS, _LENGTHS}
    if not needed <= helpers.keys() <= needed | {_WINDOWS, _RESAMPLED}:
        return None
    sizes = {name: getattr(tower, name) for name in (*_SIZES, *_RESAMPLING) if hasattr(tower, name)}
    wanted = {"spatial_merge_size"}
    wanted |= {"window_size", "patch_size"} if _WINDOWS in helpers else set()
    wanted |= {"num_grid_per_side", *_RESAMPLING} if _RESAMPLED in helpers else set()
    if not wanted <= sizes.keys():
        return None
    return Tower(helpers, tower.config, sizes, flash="flash" in (tower.config._attn_implementation or ""))
