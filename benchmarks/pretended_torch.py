"""Who asks torch about CUDA hears of a GPU: streams, pinned memory, autocast, the choice of attention kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.amp.autocast_mode
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from benchmarks import pretended_kernels as kernels
from benchmarks.pretended_gpu import GPU, OnGPU, PretendedGPU

HALF = (torch.bfloat16, torch.float16)
# What autocast computes narrow, and wide: ATen/autocast_mode.h of torch, as far as models use it.
NARROW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, F.scaled_dot_product_attention,
}  # fmt: skip
WIDE = {
    F.layer_norm, torch.layer_norm, torch.softmax, F.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax,
    Tensor.log_softmax, torch.logsumexp, Tensor.logsumexp, torch.cumsum, Tensor.cumsum, torch.pow, Tensor.pow,
    Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.sum, Tensor.sum, torch.exp, Tensor.exp, torch.log, Tensor.log,
    F.softplus,
}  # fmt: skip


class _AsCUDA(TorchFunctionMode):
    """Autocast and the choice of attention kernels, which in C++ ask a tensor for its device and would hear `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.narrowed: dict[int, Tensor] = {}  # weights, as autocast keeps them while it is entered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cuda"):
            if func in NARROW and "out" not in kwargs:
                args, kwargs = tree_map(self._narrow, (args, kwargs))
            elif func in WIDE:
                args, kwargs = tree_map(_widen, (args, kwargs))
        if func is Tensor.to and args[1:2] in (("cuda",), (torch.device("cuda"),)):  # C++ would ask which is current
            args = (args[0], GPU, *args[2:])
        if func is torch.tensor and isinstance(args[0], list | tuple):  # C++ reads numbers of the GPU one by one
            args = ([each.item() if isinstance(each, OnGPU) else each for each in args[0]], *args[1:])
        if func is F.scaled_dot_product_attention and isinstance(args[0], OnGPU):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _narrow(self, value: Any) -> Any:
        dtype = torch.get_autocast_dtype("cuda")
        if not _is_on_gpu(value) or value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        if id(value) not in self.narrowed:
            self.narrowed[id(value)] = value.to(dtype)
        return self.narrowed[id(value)]


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, OnGPU) and value.is_floating_point()


def _widen(value: Any) -> Any:
    return value.float() if _is_on_gpu(value) and value.dtype in HALF else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel without a mask, the memory-efficient one with a mask, as CUDA chooses for 16 bits."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa:
        raise RuntimeError("no fused kernel takes grouped heads with a mask: all scores would be held")
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    width = attn_mask.shape[-1]
    if width % 16:  # the kernel wants rows that begin at multiples of 16
        attn_mask = F.pad(attn_mask, (0, 16 - width % 16))[..., :width]
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    learns = torch.is_grad_enabled()
    return efficient(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


class _Queue:
    """A stream, or an event on one: all work is done when it is asked for, so that only waits are of interest."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = GPU

    def synchronize(self) -> None:
        if PretendedGPU.current is not None:
            PretendedGPU.current.waited("synchronize")

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Queue()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None: ...


_QUEUE = _Queue()
CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "pretended",
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *_: None,
    "is_current_stream_capturing": lambda: False,
    "Stream": _Queue,
    "Event": _Queue,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda *_: _QUEUE,
    "default_stream": lambda *_: _QUEUE,
    "synchronize": lambda *_: _QUEUE.synchronize(),
    "empty_cache": lambda: None,
}
ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: True,
    "current_accelerator": lambda *_, **__: torch.device("cuda"),
    "device_count": lambda: 1,
    "current_device_index": lambda: 0,
    "set_device_index": lambda *_: None,
    "current_stream": lambda *_: _QUEUE,
    "set_stream": lambda *_: None,
    "synchronize": lambda *_: _QUEUE.synchronize(),
}


@contextlib.contextmanager
def pretended_gpu(*, numbers: bool) -> Iterator[PretendedGPU]:
    """Within it there is a GPU, `cuda:0`, whose work is counted.

    Args:
        numbers: whether floats on it have values.
    """
    mode = _AsCUDA()
    clear, run_backward = torch.clear_autocast_cache, torch.autograd._engine_run_backward

    def clear_both() -> None:
        mode.narrowed.clear()
        clear()

    def run_backward_here(*args: Any, **kwargs: Any) -> Any:
        with mode:  # torch leaves it for `backward`, within which checkpointed layers are computed again
            return run_backward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for module, answers in ((torch.cuda, CUDA), (torch.accelerator, ACCELERATOR)):
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(module, name, answer, create=True))
        for owner, name, answer in (
            (torch, "clear_autocast_cache", clear_both),
            (torch.autograd, "_engine_run_backward", run_backward_here),
            (torch, "Stream", _Queue),
            (torch, "Event", _Queue),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.amp.autocast_mode, "_get_available_device", lambda: "cuda"),
            (Tensor, "pin_memory", lambda self, *_: kernels.pin(self)),
            (Tensor, "is_pinned", lambda self, *_: kernels.is_pinned(self)),
        ):
            stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        stack.enter_context(_whole_operations())
        stack.enter_context(mode)
        yield stack.enter_context(PretendedGPU(numbers=numbers))


@contextlib.contextmanager
def _whole_operations() -> Iterator[None]:
    """Operations that a CPU build takes apart for `cuda`, because it has a kernel for a CPU alone, stay whole."""
    library = torch.library.Library("aten", "IMPL")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            has = {
                key: torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
                for key in ("CompositeImplicitAutograd", "CPU", "CUDA")
            }
            if has["CompositeImplicitAutograd"] and has["CPU"] and not has["CUDA"]:
                with contextlib.suppress(RuntimeError):
                    library.impl(name.removeprefix("aten::"), never, "CUDA")
    try:
        yield
    finally:
        library._destroy()
