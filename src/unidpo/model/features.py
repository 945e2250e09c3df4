"""Features of images: what a model's vision tower and projector make of pixels, given to its forward in their place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unidpo.errors import ModelError
from unidpo.model.parts import parameters_by_part
from unidpo.model.pixels import with_pixels
from unidpo.model.tower import TOWER_INPUTS


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of the images of one prompt or several, a row per image token in the order of the tokens.

    Attributes:
        pooled: what takes the place of the image tokens' embeddings.
        deepstack: what the first layers add to their hidden states at image tokens (Qwen3-VL); `None` elsewhere.
        listed: whether the model's forward takes `pooled` as a list of tensors, as most do, or as one tensor.
    """

    pooled: Float[Tensor, "tokens hidden"]
    deepstack: Float[Tensor, "layers tokens hidden"] | None
    listed: bool

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name; `from_tensors` takes them back."""
        found = {"pooled": self.pooled, "listed": torch.tensor(self.listed)}
        return found if self.deepstack is None else found | {"deepstack": self.deepstack}

    @property
    def are_finite(self) -> bool:
        """Whether there is no NaN and no infinity among them."""
        # Extremes take one look at each number, and a NaN becomes both.
        held = [self.pooled] if self.deepstack is None else [self.pooled, self.deepstack]
        return all(bool(torch.stack(torch.aminmax(tensor)).isfinite().all()) for tensor in held)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ImageFeatures:
        return cls(tensors["pooled"], tensors.get("deepstack"), bool(tensors["listed"]))

    def split(self, tokens: Sequence[int]) -> list[ImageFeatures]:
        """The features of prompts that lie one after another in this, with so many image tokens each."""
        pooled = torch.split(self.pooled, list(tokens))
        deepstack = [None] * len(tokens) if self.deepstack is None else torch.split(self.deepstack, list(tokens), dim=1)
        return [ImageFeatures(*each, self.listed) for each in zip(pooled, deepstack, strict=True)]

    def as_output(self) -> BaseModelOutputWithPooling:
        """What `get_image_features` would have given, as far as a forward looks at it."""
        output = BaseModelOutputWithPooling(pooler_output=[self.pooled] if self.listed else self.pooled)
        if self.deepstack is not None:
            output.deepstack_features = [[layer] for layer in self.deepstack]
        return output


def join(features: Sequence[ImageFeatures]) -> ImageFeatures | None:
    """Features one after another; `None` of none."""
    if not features:
        return None
    deepstack = [each.deepstack for each in features if each.deepstack is not None]
    return ImageFeatures(
        pooled=torch.cat([each.pooled for each in features]),
        deepstack=torch.cat(deepstack, dim=1) if deepstack else None,
        listed=features[0].listed,
    )


def images_are_frozen(model: PreTrainedModel) -> bool:
    """Whether nothing is trained between an image and its features; false where the model's parts are unknown."""
    try:
        found = parameters_by_part(model)
    except ModelError:
        return False
    return not any(weight.requires_grad for part in ("vision", "projector") for _, weight in found[part])


def takes_features(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes features of images in place of the images."""
    base = model.base_model
    takes = inspect.signature(type(base).forward).parameters
    return hasattr(base, "get_image_features") and "mm_encoder_outputs" in takes


def image_features(model: PreTrainedModel, images: Mapping[str, Any]) -> ImageFeatures:
    """What the model's vision tower and projector make of images, see `packs.images_of`."""
    base = model.base_model
    takes = inspect.signature(type(base).get_image_features).parameters
    inputs = {name: t for name, t in with_pixels(images).items() if name in takes or name in TOWER_INPUTS}
    output = base.get_image_features(**inputs, return_dict=True)
    pooled = output.pooler_output
    listed = not isinstance(pooled, Tensor)
    layers = getattr(output, "deepstack_features", None)
    return ImageFeatures(
        pooled=torch.cat(list(pooled)) if listed else pooled.flatten(0, -2),
        deepstack=torch.stack([torch.cat(list(layer)) for layer in layers]) if layers else None,
        listed=listed,
    )


def without_pixels(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of an image processor's tensors a model still looks at when it has the features: how images lie."""
    return {name: tensor for name, tensor in vision.items() if name.endswith("_grid_thw")}
