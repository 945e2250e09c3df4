"""How batches travel: all tensors in one buffer, one copy of it, and the next copy begun before a batch is used."""

from collections import Counter
from dataclasses import dataclass, field, fields

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pretended_gpu import GPU
from benchmarks.pretended_torch import pretended_gpu
from unidpo.losses import LossTerms, PairLogps
from unidpo.model.batches import BatchMaker
from unidpo.model.pixels import with_pixels
from unidpo.model.transfer import ON_HOST, Parcel, ahead, to_device
from unidpo.training.metrics import PairColumns
from worlds import group, tiny_policy

META = torch.device("meta")


@pytest.fixture(scope="module")
def batch():
    encoder = tiny_policy()[2]
    groups = [group(images=1), group(images=0, seed=1)]
    stored = [torch.arange(len(one.responses), dtype=torch.float64) for one in groups]
    return BatchMaker(groups, encoder, ref_logps=stored).batch([(0, (0,)), (1, (0,))])[0]


def tensors_of(value):
    """The tensors of a batch by name, found in another way than `transfer` finds them."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    if isinstance(value, dict):
        parts = value
    elif isinstance(value, tuple):
        parts = dict(enumerate(value))
    else:
        parts = (
            {f.name: getattr(value, f.name) for f in fields(value)} if hasattr(value, "__dataclass_fields__") else {}
        )
    return {f"{name}.{inner}": t for name, part in parts.items() for inner, t in tensors_of(part).items()}


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        result = function(*args, **(kwargs or {}))
        self.count += copies and len({t.device for t in (*args, result) if isinstance(t, torch.Tensor)}) == 2
        return result


def test_a_batch_goes_to_a_device_whole_and_by_one_copy(batch):
    with Copies() as copies:
        moved = to_device(batch, META)
    assert copies.count == 1
    before, after = tensors_of(batch), tensors_of(moved)
    assert after.keys() == before.keys()
    assert all(tensor.is_meta for tensor in after.values())
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert moved.responses.segments == batch.responses.segments
    assert moved.pairs.rows == batch.pairs.rows


def test_what_only_the_ledger_needs_does_not_go_along(batch):
    names = {name.strip(".") for name in tensors_of(to_device(batch, META).pairs)}
    assert names == {"chosen", "rejected", "chosen_scores", "rejected_scores"}


def test_on_the_cpu_nothing_is_copied(batch):
    assert to_device(batch, torch.device("cpu")) is batch
    assert next(ahead([batch], torch.device("cpu"))) is batch


@dataclass(frozen=True)
class Odd:
    strided: torch.Tensor
    nothing: torch.Tensor
    scalar: torch.Tensor
    flags: torch.Tensor
    several: tuple
    named: dict
    absent: None
    kept: torch.Tensor = field(metadata=ON_HOST)


def odd():
    table = torch.arange(15, dtype=torch.float64).view(5, 3)
    flags = torch.tensor([True, False, True])
    several = (torch.tensor([1, 2]), torch.tensor([], dtype=torch.bfloat16), torch.tensor([3.5]))
    return Odd(table[:, 1], table[:0], torch.tensor(7), flags, several, {"n": table.t()}, None, torch.tensor([9]))


def test_a_parcel_holds_every_number_in_one_buffer(batch):
    for value in (odd(), batch):
        opened = Parcel.of(value).open()
        before, after = tensors_of(value), tensors_of(opened)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
        kept = {id(tensor) for name, tensor in after.items() if name.startswith("kept")}
        assert len({t.untyped_storage().data_ptr() for t in after.values() if id(t) not in kept}) == 1
    assert Parcel.of("nothing of a tensor").open() == "nothing of a tensor"


def test_a_parcel_is_hardly_larger_than_what_is_in_it(batch):
    held = tensors_of(batch)
    parcel = Parcel.of(batch)
    assert parcel.buffer.nbytes < sum(t.nbytes for t in held.values()) + 256 * len(held)
    assert all(tensor.is_meta for tensor in tensors_of(parcel.form).values())


def test_a_parcel_that_was_opened_is_not_packed_again(batch):
    parcel = Parcel.of(batch)
    assert Parcel.of(parcel.open()).buffer.data_ptr() == parcel.buffer.data_ptr()
    part = parcel.open().responses  # lies in the buffer, and is not all of it
    assert Parcel.of(part).buffer.nbytes < parcel.buffer.nbytes


def test_what_no_device_needs_stays(batch):
    one = odd()
    moved = to_device(one, META)
    assert moved.kept is one.kept
    assert moved.strided.is_meta
    assert all(each.is_meta for each in moved.several)


# --- ahead of the computation -----------------------------------------------------------------------------------------


def test_the_next_copy_begins_before_a_batch_is_used(monkeypatch):
    done = []
    monkeypatch.setattr("unidpo.model.transfer.to_device", lambda batch, device: done.append(f"copy {batch}") or batch)
    for number in ahead([1, 2, 3], META):
        done += [f"use {number}"]
    assert done == ["copy 1", "copy 2", "use 1", "copy 3", "use 2", "use 3"]
    assert list(ahead([], META)) == []


def test_copies_run_on_a_stream_of_their_own_and_are_waited_for(batch, monkeypatch):
    """As far as a machine without an accelerator can say: in which order things are asked for, and of which stream."""
    done = []

    class Side:
        def __init__(self, device):
            self.copies = 0

        def __enter__(self):
            done.append("side")

        def __exit__(self, *_):
            done.append("main")

        def record_event(self):
            self.copies += 1
            return self.copies

    class Main:
        def wait_event(self, event):
            done.append(f"wait for {event}")

    real = Parcel.of

    def of(batch, *, pinned=False):
        done.append(f"copy, pinned: {pinned}")
        return real(batch)

    monkeypatch.setattr("unidpo.model.transfer.copies_beside", lambda device: True)
    monkeypatch.setattr(torch, "Stream", Side)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Main())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: done.append("keep"))
    monkeypatch.setattr(Parcel, "of", of)
    for moved in ahead([batch, batch], META):
        assert moved.responses.input_ids.is_meta
        done.append("use")
    copy = ["side", "copy, pinned: True", "main", "keep"]
    assert done == [*copy, *copy, "wait for 1", "use", "wait for 2", "use"]


# --- on a pretended GPU -----------------------------------------------------------------------------------------------


def test_a_step_asks_for_one_copy_a_micro_batch_and_one_wait(batch):
    plain = tiny_policy()[2]
    bytewise = BatchMaker([group(images=1)], plain.in_bytes([group(images=1)])).batch([(0, (0,))])[0]
    columns = PairColumns()
    with pretended_gpu(numbers=True) as gpu:
        micro_batches = [batch, Parcel.of(batch).pin_memory().open(), bytewise]
        for host, moved in zip(micro_batches, ahead(micro_batches, GPU), strict=True):
            numbers = moved.pairs.chosen_scores.float()
            terms = LossTerms(*[numbers] * len(fields(LossTerms)))
            columns.add(host, PairLogps(numbers, numbers), terms)
            assert with_pixels(moved.responses.vision)["pixel_values"].device == GPU
        assert sum(gpu.counts.waits.values()) == 0
        taken = columns.take()
        assert Counter(kind for kind, _ in gpu.counts.copies.elements()) == {"pinned": 3}
        assert sum(gpu.counts.waits.values()) == 1
    assert taken["loss"] == [5.0] * 5
