"""How a batch travels, to another process, to pinned memory, to a device: its tensors in one buffer, by one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from unidpo.devices import accelerator, has_float64

T = TypeVar("T")

ON_HOST: Mapping[str, Any] = MappingProxyType({"on_host": True})
"""Metadata of a dataclass field that no device needs: tensors of `field(metadata=ON_HOST)` stay where they are."""

_ALIGNMENT = 256  # bytes; where an allocator of a device begins a tensor, too


@dataclass(frozen=True, slots=True)
class Parcel(Generic[T]):
    """A batch whose tensors lie in one buffer, one after another.

    Attributes:
        form: the batch, with tensors that have shapes and no memory (device `meta`).
        buffer: what is in them.
    """

    form: T
    buffer: UInt8[Tensor, " bytes"]

    @classmethod
    def of(cls, batch: T, *, pinned: bool = False) -> Parcel[T]:
        """A copy; none where the tensors lie in a parcel's buffer already, as those of an opened one do."""
        tensors = _tensors(batch)
        buffer = _buffer_of(tensors)
        if buffer is None:
            buffer = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=pinned)
            for place, tensor in zip(_places(buffer, tensors), tensors, strict=True):
                place.copy_(tensor)
        return cls(_mapped(lambda tensor: torch.empty_like(tensor, device="meta"), batch), buffer)

    def pin_memory(self) -> Parcel[T]:
        """A copy in pinned memory; torch's loader calls this."""
        return replace(self, buffer=self.buffer.pin_memory())

    def open(self) -> T:
        """The batch; its tensors are views of the buffer."""
        places = _places(self.buffer, _tensors(self.form))
        batch: T = _mapped(lambda _: next(places), self.form)
        return batch


def opened(item: T | Parcel[T]) -> T:
    """What comes from another process, as a parcel or not."""
    return item.open() if isinstance(item, Parcel) else item


def to_device(batch: T, device: torch.device) -> T:
    """A dataclass or mapping with its tensors, those of the mappings, tuples and dataclasses in it too, on a device.

    They go there by one copy, float64 as float32 where the device has none. On the CPU it is the batch itself. Tensors
    of fields `ON_HOST` stay where they are.
    """
    return batch if device.type == "cpu" else _sent(batch, device).open()


def ahead(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """Batches on a device; while one is used, the copy of the next is under way, beside what the device computes."""
    side = torch.Stream(device) if copies_beside(device) else None

    def begin(batch: T) -> tuple[T, Any]:
        if side is None:
            return to_device(batch, device), None
        with side:
            sent = _sent(batch, device)
        # Its memory is of the side's stream; it must not be given away while the computation still reads it.
        sent.buffer.record_stream(torch.accelerator.current_stream(device))
        return sent.open(), side.record_event()

    def finish(batch: T, copied: Any) -> T:
        if copied is not None:
            torch.accelerator.current_stream(device).wait_event(copied)
        return batch

    begun = map(begin, batches)
    current = next(begun, None)
    while current is not None:
        following = next(begun, None)
        yield finish(*current)
        current = following


def copies_beside(device: torch.device) -> bool:
    """Whether a device takes copies from pinned memory while it computes."""
    present = accelerator()
    return present is not None and present.type == device.type != "mps"


def _sent(batch: T, device: torch.device) -> Parcel[T]:
    if not has_float64(device):
        batch = _mapped(lambda tensor: tensor.float() if tensor.dtype == torch.float64 else tensor, batch)
    parcel = Parcel.of(batch, pinned=copies_beside(device))
    return replace(parcel, buffer=parcel.buffer.to(device, non_blocking=True))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A batch, or a part of one, with each of its tensors changed, in a fixed order; those `ON_HOST` stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(change, each) for name, each in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(map(change, value))
    if is_dataclass(value) and not isinstance(value, type):
        moving = [field.name for field in fields(value) if "on_host" not in field.metadata]
        return replace(value, **{name: _mapped(change, getattr(value, name)) for name in moving})
    return value


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(note, batch)
    return found


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _places(buffer: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Where tensors lie in a parcel's buffer."""
    start = 0
    for tensor in tensors:
        yield buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)


def _buffer_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The buffer where tensors lie as in a parcel; `None` where they do not."""
    if not tensors or tensors[0].untyped_storage().nbytes() != sum(map(_room, tensors)):
        return None
    buffer = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())
    places = _places(buffer, tensors)
    pairs = zip(tensors, places, strict=True)
    return buffer if all(t.is_contiguous() and t.data_ptr() == place.data_ptr() for t, place in pairs) else None
