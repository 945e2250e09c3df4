"""Machines with other devices than CUDA, stood in for by what torch would say there."""

from types import SimpleNamespace

import pytest
import torch

from trainers import some_groups, trainer_of
from unidpo import devices
from unidpo.model import transfer
from unidpo.model.attention import missing
from unidpo.model.batches import BatchMaker
from worlds import tiny_policy

CPU, CUDA, MPS, XPU = map(torch.device, ("cpu", "cuda", "mps", "xpu"))


@pytest.fixture
def machine(monkeypatch):
    """Pretends that torch can use so many devices of a kind, and that the system shows some."""

    def there(kind=None, count=0, nodes=()):
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=lambda: "H200"))
        monkeypatch.setattr(devices, "_NODES", dict.fromkeys(nodes, "an NVIDIA GPU"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return there


def test_the_accelerator_is_whatever_torch_has(machine):
    machine()
    assert devices.best_device() == CPU
    assert devices.device_name(devices.accelerator()) == torch.backends.cpu.get_cpu_capability()
    machine("xpu", 2)
    assert devices.best_device(1) == torch.device("xpu", 1)
    assert devices.device_name(XPU) == "H200"


def test_a_device_that_is_not_used_is_said(machine, monkeypatch, tmp_path):
    machine("cuda", 1)
    assert devices.unused_devices(CUDA, 1) is None
    assert "the CPU, and there is H200: leave train.use_cpu out" in devices.unused_devices(CPU, 1)
    machine("cuda", 4)
    assert "1 of 4 cuda devices: --nproc 4" in devices.unused_devices(CUDA, 1)
    assert devices.unused_devices(CUDA, 4) is None
    machine()
    assert devices.unused_devices(CPU, 1) is None
    card = tmp_path / "nvidia0"
    card.touch()
    machine(nodes=[str(card)])
    assert "there is an NVIDIA GPU that torch" in devices.unused_devices(CPU, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert devices.unused_devices(CPU, 1) is None


def test_a_training_says_it_and_takes_one_device_of_several(tmp_path, machine, caplog):
    machine("cuda", 4)
    trainer = trainer_of(tmp_path, some_groups(2))
    assert "leave train.use_cpu out" in caplog.text
    assert trainer.args.n_gpu == 1


def test_where_there_is_no_float64_a_batch_goes_in_float32(monkeypatch):
    assert devices.has_float64(CUDA)
    assert not devices.has_float64(MPS)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=False))
    assert not devices.has_float64(XPU)
    _, _, encoder = tiny_policy()
    groups = some_groups(2)
    known = [torch.arange(len(group.responses), dtype=torch.float64) for group in groups]
    batch, _ = BatchMaker(groups, encoder, ref_logps=known).batch([(0, (0,)), (1, (0,))])
    meta = torch.device("meta")
    assert transfer.to_device(batch, meta).pairs.chosen_scores.dtype == torch.float64
    monkeypatch.setattr(transfer, "has_float64", lambda device: False)
    there = transfer.to_device(batch, meta)
    for narrowed in (there.pairs.chosen_scores, there.pairs.rejected_scores, there.ref_logps):
        assert narrowed.dtype == torch.float32
    assert there.pairs.chosen.dtype == torch.int64
    assert batch.ref_logps.dtype == batch.pairs.chosen_scores.dtype == torch.float64  # the ledger's


@pytest.mark.parametrize("device", [CPU, MPS, XPU], ids=str)
def test_without_cuda_there_is_sdpa(device):
    assert missing("sdpa", device=device, dtype=torch.bfloat16) is None
    for name in ("varlen", "flash", "flex"):
        assert missing(name, device=device, dtype=torch.bfloat16) == (
            f"it needs a CUDA GPU, and the model is on {device.type}"
        )


def test_an_amd_gpu_calls_itself_cuda_and_has_no_varlen(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "it is for NVIDIA's GPUs" in missing("varlen", device=CUDA, dtype=torch.bfloat16)
    assert missing("sdpa", device=CUDA, dtype=torch.bfloat16) is None
