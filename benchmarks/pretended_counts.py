"""What is counted of the work of a GPU, and which operations make the host wait."""

from __future__ import annotations

import collections
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from benchmarks import pretended_kernels as kernels

# Views and allocations: no kernel runs.
FREE = {
    "view", "_unsafe_view", "t", "transpose", "expand", "detach", "alias", "slice", "select", "unsqueeze", "squeeze",
    "permute", "split", "split_with_sizes", "as_strided", "unbind", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "_reshape_alias", "unfold", "diagonal", "lift_fresh", "set_", "is_same_size", "resize_",
    "_has_compatible_shallow_copy_type", "_sparse_coo_tensor_with_dims_and_tensors", "_values", "_indices",
    "_coalesced_", "is_coalesced", "dense_dim", "sparse_dim", "is_pinned",
}  # fmt: skip
# The host must know how many there are, or which.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave", "_coalesce", "allclose", "argwhere",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# Of their first argument they read what they give, no more.
LOOKUPS = {"embedding", "index_select", "gather", "index"}
# They write one argument and do not read it.
WRITES = {"copy_", "fill_", "zero_", "full_like", "zeros_like", "ones_like"}


@dataclass
class Counts:
    """What the GPU was asked to do.

    Attributes:
        kernels: started, by operation.
        waits: of the host for the GPU, by kind and place.
        copies: from the host, by kind and place: "blocking", "pageable" (asked not to block, of memory that is not
            pinned), "pinned".
        copied_bytes: from the host.
        work: floating-point operations of matrix products and attention, by operation.
        matrix_bytes, other_bytes: read and written by matrix products and attention, and by all else, by operation.
    """

    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    waits: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    copies: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    copied_bytes: int = 0
    work: collections.Counter[str] = field(default_factory=collections.Counter)
    matrix_bytes: collections.Counter[str] = field(default_factory=collections.Counter)
    other_bytes: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def blocking(self) -> int:
        """Copies from the host that it waits for."""
        return sum(count for (kind, _), count in self.copies.items() if kind == "blocking")

    def add(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Count a kernel: an operation, what it was given, and the tensors among that and in what it gave."""
        name = func.overloadpacket.__name__
        self.kernels[name] += 1
        work = kernels.WORK.get(func) or flop_registry.get(func.overloadpacket)
        if work is not None:
            self.work[name] += work(*args, **kwargs, out_val=outputs[0])
        read, written = [_bytes(x) for x in inputs], sum(map(_bytes, outputs))
        if name in LOOKUPS:
            read[0] = min(read[0], written)
        elif kwargs.get("out") is not None:
            read[-1] = 0
        elif name in WRITES:
            read[0] = 0
        (self.other_bytes if work is None else self.matrix_bytes)[name] += sum(read) + written


def calling_place() -> str:
    """Where the code that is counted stands."""
    own = ("benchmarks/pretended_", "/torch/", "contextlib", "_jaxtyping", "jaxtyping/", "beartype", "<@", "<string>")
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in own):
            return f"{frame.filename.split('site-packages/')[-1].split('/src/')[-1]}:{frame.lineno} {frame.name}"
    return "?"


def _bytes(tensor: Tensor) -> int:
    """Of its elements, each once however often it is repeated by an expanded axis."""
    if tensor.layout is not torch.strided:
        return 2 * int(tensor._values().nbytes)
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
