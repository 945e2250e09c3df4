"""Layers compiled by torch, each by itself and in place: norms, rotary positions and activations in fewer kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.compiler.config
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND: str | Callable[..., Any] = "inductor"
"""Of `torch.compile`."""
# Variants of a layer: of which tower, training or not, adapter on or off, gradients of its input or none. Torch's own
# limit of 8 is for all of them together, and what comes after it is not compiled.
_MOST_VARIANTS = 64


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Decoder layers and vision blocks: what transformers can compute again in the backward pass, outermost first."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inside]


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether `compile_layers` was called, and not `uncompile_layers` after it."""
    return any(layer._compiled_call_impl is not None for layer in layers_of(model))


def compile_layers(model: torch.nn.Module) -> None:
    """Have each layer compiled when it is first called, for tokens and images of any number.

    Parameters keep their names. A pack's attention, and a vision tower's over images of different sizes, stay as they
    are: they look at where each sequence begins, which no compiled code could do for the next batch.
    """
    uncompile_layers(model)
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, _MOST_VARIANTS)
    for layer in layers_of(model):
        layer.compile(dynamic=True, backend=BACKEND)
        if (checkpoint := _checkpoint_within_forward(layer)) is not None:
            layer._gradient_checkpointing_func = _CompiledWithin(checkpoint)  # type: ignore[assignment]
        for part in layer.children():
            forward = type(part).forward
            if "cu_seqlens" in inspect.signature(forward).parameters:
                part.forward = MethodType(torch.compiler.disable(forward), part)  # type: ignore[no-untyped-call]


def uncompile_layers(model: torch.nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in layers_of(model):
        layer._compiled_call_impl = None
        checkpoint = vars(layer).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, _CompiledWithin):
            layer._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
        for part in layer.children():
            if isinstance(forward := vars(part).get("forward"), MethodType) and forward.__self__ is part:
                del part.forward


def _checkpoint_within_forward(layer: torch.nn.Module) -> Callable[..., Any] | None:
    """What computes a layer again in the backward pass, where its forward calls it (transformers 5.23), not its caller.

    Around attention, which breaks the graph, torch would then compile nothing.
    """
    if "__call__" in vars(GradientCheckpointingLayer):
        return None
    return vars(layer).get("_gradient_checkpointing_func")


class _CompiledWithin:
    """A checkpoint that is not compiled and compiles what it is around.

    Args:
        checkpoint: takes a partial function of the layer's forward, and tensors.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, function: partial[Any], *args: Any) -> Any:
        compiled = _compiled(function.func, BACKEND)
        return self.checkpoint(partial(compiled, *function.args, **function.keywords), *args)


@functools.cache
def _compiled(forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(forward, dynamic=True, backend=backend)
    return compiled
