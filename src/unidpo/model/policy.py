"""A model in whatever wrapper it trains in, as one function: batch → log-probability per response."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unidpo.model.attention import set_text_attention
from unidpo.model.compiling import compile_layers, is_compiled, uncompile_layers
from unidpo.model.features import ImageFeatures, image_features
from unidpo.model.logps import response_logps
from unidpo.model.packs import Pack, PaddedRows

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """A model to ask for log-probabilities, with gradients or without.

    Attributes:
        model: a transformers model, or one with an adapter around it.
        wrapped: the same within DDP, FSDP or a DeepSpeed engine, or `model` itself.
        autocast: a fresh context for each forward.
    """

    model: torch.nn.Module
    wrapped: torch.nn.Module
    autocast: Callable[[], AbstractContextManager[object]] = field(default=contextlib.nullcontext)

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model; its layers still hold the adapter."""
        return self.model if isinstance(self.model, PreTrainedModel) else self.model.get_base_model()  # type: ignore[operator]

    @property
    def has_adapter(self) -> bool:
        return not isinstance(self.model, PreTrainedModel)

    def response_logps(self, batch: Pack | PaddedRows) -> Float[Tensor, " responses"]:
        """See `logps.response_logps`."""
        return self._as_forward(lambda: response_logps(self.plain, batch))

    def image_features(self, images: Mapping[str, Any]) -> ImageFeatures:
        """See `features.image_features`; without gradient, and without dropout."""
        with self.measuring():
            # Wrappers look for tensors in what a forward returns, and know dictionaries.
            return ImageFeatures.from_tensors(self._as_forward(lambda: image_features(self.plain, images).tensors))

    def _as_forward(self, compute: Callable[[], T]) -> T:
        """What `compute` gives.

        Wrappers gather weights and watch gradients around the forward of the module they hold, so the computation
        takes the place of that forward while it runs.
        """

        def forward() -> T:
            with self.autocast():
                return compute()

        with _forward_of(self.model, forward):
            result: T = self.wrapped()
        return result

    def without_adapter(self) -> AbstractContextManager[None]:
        """The model as it was loaded, where an adapter is trained."""
        return self.model.disable_adapter() if self.has_adapter else contextlib.nullcontext()  # type: ignore[operator]

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards the mode it was in."""
        was_training = self.wrapped.training
        self.wrapped.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.wrapped.train(was_training)

    @property
    def attention(self) -> str:
        """The language model's attention."""
        name: str = self.plain.config.get_text_config()._attn_implementation
        return name

    def set_attention(self, name: str) -> None:
        """Switch the language model's attention; a vision tower keeps its own."""
        set_text_attention(self.plain, name)

    @property
    def compiled(self) -> bool:
        """Whether its layers are."""
        return is_compiled(self.plain)

    def set_compiled(self, compiled: bool) -> None:
        """Compile the layers, or leave that off again; see `compiling`."""
        (compile_layers if compiled else uncompile_layers)(self.plain)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards the attention is what it was, and the layers are compiled or not as they were."""
        before, compiled = self.attention, self.compiled
        try:
            yield
        finally:
            self.set_attention(before)
            self.set_compiled(compiled)


@contextlib.contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[[], Any]) -> Iterator[None]:
    # accelerate leaves a forward of its own on the instance.
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
