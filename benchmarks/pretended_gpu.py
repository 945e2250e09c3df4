"""A CPU that says it is `cuda:0`: what a GPU would be asked to do is counted here, without one.

Tensors on it report `cuda:0` and refuse to meet others. Integers keep their values; floats keep them too
(`numbers=True`, for small models) or are shapes alone (`numbers=False`, for a model whose weights nobody holds).
`benchmarks.pretended_torch` gives torch what it asks a CUDA build for. Not seen: whether kernels are right, fragments
of memory, what happens within a kernel.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import pretended_kernels as kernels
from benchmarks.pretended_counts import FREE, INDEXING, WAITS, Counts, calling_place

GPU = torch.device("cuda", 0)
BLOCK = 512  # bytes, to which the caching allocator rounds up
aten = torch.ops.aten


class MixedDevicesError(RuntimeError):
    """An operation met tensors of the host and of the GPU."""


class OnGPU(Tensor):
    """A tensor that says it is on `cuda:0`; `held` has its numbers, or on the meta device its shape."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnGPU:
        # C++ sees a meta tensor: autograd of a `cuda` tensor aborts in a build without CUDA.
        shell = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        made = torch.Tensor._make_subclass(cls, shell, requires_grad, device_for_backend_keys=GPU)
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    def get_device(self) -> int:
        return 0

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, *_: Any) -> None: ...

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or GPU, requires_grad=requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = device in (None, GPU, torch.device("cuda"))
        same = dtype in (None, self.dtype) and memory_format in (None, torch.preserve_format)
        if here and same and not kwargs.get("copy"):
            return self  # C++ would see another device and copy
        return super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if PretendedGPU.current is None:
            raise RuntimeError(f"{func} on the pretended GPU, outside of it")
        return PretendedGPU.current.run(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Runs what a GPU would run, and counts. `counts` and `peak` may be begun anew with `reset`.

    Attributes:
        now, peak: bytes held by tensors on the GPU.
    """

    current: PretendedGPU | None = None

    def __init__(self, *, numbers: bool) -> None:
        super().__init__()
        self.numbers = numbers
        self.counts = Counts()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[int, Any]] = {}

    def reset(self) -> None:
        self.counts, self.peak = Counts(), self.now

    def __enter__(self) -> Any:
        self._before, PretendedGPU.current = PretendedGPU.current, self
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` comes by here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PretendedGPU.current = self._before
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)

    def put(self, module: torch.nn.Module) -> None:
        """Move a module's parameters and buffers over; shared ones stay shared."""
        moved: dict[int, torch.nn.Parameter] = {}
        for each in module.modules():
            for name, weight in each._parameters.items():
                if weight is not None:
                    if id(weight) not in moved:
                        new = torch.nn.Parameter(self.wrap(self._hold(weight.detach())), weight.requires_grad)
                        moved[id(weight)] = new
                    each._parameters[name] = moved[id(weight)]
            for name, buffer in each._buffers.items():
                if buffer is not None and not isinstance(buffer, OnGPU):
                    each._buffers[name] = self.wrap(buffer.detach())

    def wrap(self, held: Tensor) -> Tensor:
        """A tensor on the GPU; one with sparse layout stays itself."""
        if held.layout is not torch.strided:
            return held
        self._see(held)
        return OnGPU(held)

    def waited(self, kind: str) -> None:
        """Count a wait of the host."""
        self.counts.waits[kind, calling_place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if func is torch.ops.prim.device.default:
            return GPU if isinstance(args[0], OnGPU) else args[0].device
        tensors = list(_tensors((args, kwargs)))
        here = [x for x in tensors if isinstance(x, OnGPU) or x.layout is not torch.strided]
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        if not here and (device is None or device.type != "cuda"):
            pinned = kwargs.get("pin_memory")
            made = func(*args, **{**kwargs, "pin_memory": False} if pinned else kwargs)
            return kernels.pin(made) if pinned else made
        if name in ("_to_copy", "copy_"):
            moved = self._copy_between(func, name, args, kwargs, device)
            if moved is not NotImplemented:
                return moved
        self._refuse_mixed(func, name, args, here, [x for x in tensors if not isinstance(x, OnGPU)])
        if name in WAITS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            self.waited(name)
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.waited("index by a mask")
        return self._compute(func, name, args, kwargs)

    def _copy_between(self, func: Any, name: str, args: Any, kwargs: Any, device: torch.device | None) -> Any:
        """A copy between host and GPU; `NotImplemented` where both sides are the GPU."""
        into, source = (None, args[0]) if name == "_to_copy" else args[:2]
        to_host = device is not None and device.type == "cpu" if into is None else not isinstance(into, OnGPU)
        if isinstance(source, OnGPU):
            if not to_host:
                return NotImplemented
            self.waited("copy to the host")
            known = source.held if not source.held.is_meta else torch.zeros(source.shape, dtype=source.dtype)
            if into is None:
                return func(known, **{**kwargs, "device": torch.device("cpu")}).clone()
            return into.copy_(known)
        asked = bool(kwargs.get("non_blocking") or (into is not None and len(args) > 2 and args[2]))
        kind = "blocking" if not asked else "pinned" if kernels.is_pinned(source) else "pageable"
        self.counts.copies[kind, calling_place()] += 1
        self.counts.copied_bytes += source.nbytes
        if into is not None:
            return self._compute(func, name, args, kwargs)
        made = func(source, **{k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")})
        return self.wrap(self._hold(made.clone() if made is source else made))

    def _refuse_mixed(self, func: Any, name: str, args: Any, here: list[Tensor], others: list[Tensor]) -> None:
        strangers = [x for x in others if x.dim() > 0 and x.layout is torch.strided]
        if not (here and strangers):
            return
        if name in INDEXING and not any(x is args[0] for x in strangers):
            self.counts.copies["blocking", calling_place()] += 1  # torch moves indices of the host by itself
            return
        shapes = ", ".join(str(tuple(x.shape)) for x in strangers)
        raise MixedDevicesError(f"{func} at {calling_place()}: cuda:0 and, on the host, {shapes}")

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        args_held, kwargs_held = _mapped(_held, (args, kwargs))
        inputs = list(_tensors((args_held, kwargs_held)))
        shapes_only = any(x.is_meta for x in inputs)
        known = args_held, dict(kwargs_held)
        if kwargs_held.get("device") is not None:
            meta = shapes_only or (not self.numbers and _makes_floats(name, args, kwargs))
            kwargs_held["device"] = torch.device("meta" if meta else "cpu")
        if shapes_only:
            if name in ("_local_scalar_dense", "is_nonzero"):
                return 0.5 if args[0].dtype.is_floating_point else 0
            if name in INDEXING:
                args_held = (args_held[0], _as_places(args_held[1]), *args_held[2:])
            args_held, kwargs_held = _mapped(_as_shape, (args_held, kwargs_held))
        made = self._made(func, name, args_held, kwargs_held, shapes_only)
        if name not in FREE:
            self.counts.add(func, *known, inputs, list(_tensors(made)))
        if not self.numbers and name != "view":  # that of a buffer as numbers stays in it
            made = _mapped(self._hold, made)
        place = _written_place(func)
        if place is None:
            return _mapped(self.wrap, made)
        return kwargs[place] if isinstance(place, str) else args[place]

    @staticmethod
    def _made(func: Any, name: str, args: Any, kwargs: Any, shapes_only: bool) -> Any:
        if func in kernels.KERNELS:
            return kernels.KERNELS[func](*args, **kwargs)
        sparse = next((x for x in args if isinstance(x, Tensor) and x.layout is not torch.strided), None)
        if shapes_only or (sparse is not None and sparse._values().is_meta):
            if name == "add_" and sparse is not None:
                return args[0]
            if name in ("to_dense", "_to_dense") and sparse is not None:
                return torch.empty(sparse.shape, dtype=sparse.dtype, device="meta")
        return func(*args, **kwargs)

    def _hold(self, held: Tensor) -> Tensor:
        """Without its numbers, where floats have none."""
        if self.numbers or held.layout is not torch.strided or not held.is_floating_point():
            return held
        return _as_shape(held)

    def _see(self, held: Tensor) -> None:
        storage = held.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += size
            self.peak = max(self.peak, self.now)
            self._alive[key] = size, weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]


def _as_shape(tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _as_places(indices: Any) -> list[Any]:
    """Indices without masks whose values are known: their number says the result's shape."""
    found: list[Any] = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8) and not index.is_meta
        found += index.nonzero(as_tuple=True) if masks else [index]
    return found


def _makes_floats(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation that makes a tensor from nothing makes floats."""
    if kwargs.get("dtype") is not None:
        return bool(kwargs["dtype"].is_floating_point)
    if name in ("arange", "full"):
        return any(isinstance(each, float) for each in args)
    like = args[0] if args and isinstance(args[0], Tensor) else None
    return torch.get_default_dtype().is_floating_point if like is None else like.is_floating_point()


@functools.cache
def _written_place(func: Any) -> int | str | None:
    """Which argument an operation in place, or with `out=`, gives back: the tensor it was given."""
    returns = func._schema.returns
    if not (returns and any(each.alias_info is not None and each.alias_info.is_write for each in returns)):
        return None
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return str(argument.name) if argument.kwarg_only else place
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments, or in what it gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same with changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(change, each) for name, each in value.items()}
    return value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnGPU) else tensor
