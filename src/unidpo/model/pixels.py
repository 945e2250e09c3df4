"""Pixels as the bytes they were: an eighth of what an image processor makes of them travels to the device.

Processors of Qwen's kind map each byte of a channel to one float32 and lay an image down twice, as two frames of a
video. The bytes and a table of these numbers give the same pixels, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

_LOG = logging.getLogger(__name__)

RAW: Mapping[str, Any] = {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}
"""Asks an image processor for pixels as they were, once."""
_CHANNELS = 3
_SIDE = 224  # pixels; a multiple of 28 and of 32, what processors round sides to


def pixel_table(processor: Any, image: PIL.Image.Image) -> Float[Tensor, "1 frames 3 256"] | None:
    """What a model's image processor makes of each byte, by frame and channel; `None` where that is not all of it.

    Args:
        image: an image of the data to compare on, beside one that has every byte.
    """
    ramp = np.arange(_SIDE * _SIDE * _CHANNELS).astype(np.uint8).reshape(_CHANNELS, _SIDE, _SIDE).transpose(1, 2, 0)
    pictures = [(PIL.Image.fromarray(ramp.copy()), {"do_resize": False}), (image, {})]
    try:
        images = processor.image_processor
        table = torch.full((1, images.temporal_patch_size, _CHANNELS, 256), float("nan"))
        for number, (picture, options) in enumerate(pictures):
            plain, raw = (
                {"pixel_values": images([picture], return_tensors="pt", **options, **kind)["pixel_values"]}
                for kind in ({}, RAW)
            )
            values = as_bytes(raw, table)["pixel_bytes"]
            if number == 0:
                made = plain["pixel_values"].view(len(values), _CHANNELS, table.shape[1], -1)
                for channel in range(_CHANNELS):
                    at = values[:, channel].long().flatten()
                    table[0, :, channel, at] = made[:, channel].transpose(0, 1).flatten(1)
            if not torch.equal(with_pixels(as_bytes(raw, table))["pixel_values"], plain["pixel_values"]):
                return None
    except Exception:  # whatever a foreign processor does with such a question, its own pixels are right
        _LOG.debug("pixels do not travel as bytes", exc_info=True)
        return None
    return table


def as_bytes(vision: Mapping[str, Tensor], table: Float[Tensor, "1 frames 3 256"]) -> dict[str, Tensor]:
    """An image processor's tensors with `RAW` pixels: these as bytes, beside their table."""
    kept = dict(vision)
    raw = kept.pop("pixel_values")
    return kept | {"pixel_bytes": raw.view(len(raw), _CHANNELS, -1).byte(), "pixel_table": table}


def with_pixels(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An image processor's tensors as it made them, on the device where they lie, whether they came as bytes or not."""
    kept = dict(vision)
    if "pixel_bytes" not in kept:
        return kept
    values, table = kept.pop("pixel_bytes"), kept.pop("pixel_table")[0]  # one for each group that came along
    places = values.int() + torch.arange(0, 256 * _CHANNELS, 256, dtype=torch.int, device=values.device)[:, None]
    pixels = table.flatten(1).index_select(1, places.flatten()).view(len(table), *values.shape)
    return kept | {"pixel_values": pixels.permute(1, 2, 0, 3).flatten(1)}
