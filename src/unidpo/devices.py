"""What computes on this machine: CUDA, ROCm (which calls itself `cuda`), XPU, MPS, Ascend, or nothing but the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# What the system shows of a card, whether or not torch can use it.
_NODES = {"/dev/nvidia0": "an NVIDIA GPU", "/dev/kfd": "an AMD GPU", "/dev/davinci0": "an Ascend NPU"}


def accelerator() -> torch.device | None:
    """The accelerator that torch can use, or `None`."""
    return torch.accelerator.current_accelerator(check_available=True)


def best_device(number: int = 0) -> torch.device:
    """An accelerator by its number, or the CPU where there is none."""
    found = accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type, number)


def device_name(device: torch.device | None) -> str:
    """What changes how numbers round there: the product's name, or the CPU's instructions; `None` for the CPU."""
    if device is None or device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # MPS has none
    return device.type if name is None else str(name())


def has_float64(device: torch.device) -> bool:
    """Whether it computes in float64, which Apple's and some of Intel's GPUs do not."""
    if device.type == "xpu":
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"


def empty_cache() -> None:
    """Give back the memory that torch holds and does not use."""
    if (found := accelerator()) is not None:
        torch.get_device_module(found).empty_cache()


def unused_devices(device: torch.device, processes_here: int) -> str | None:
    """Which accelerators a training leaves idle, and what to set; `None` where it uses all.

    Args:
        device: what it computes on.
        processes_here: how many of its processes are on this machine.
    """
    found = accelerator()
    if found is not None:
        count = torch.accelerator.device_count()
        if device.type == "cpu":
            return f"it trains on the CPU, and there is {device_name(found)}: leave train.use_cpu out to use it"
        if count > processes_here:
            visible = f"{processes_here} of {count} {found.type} devices"
            return f"it trains on {visible}: --nproc {count} takes all of them, CUDA_VISIBLE_DEVICES fewer"
        return None
    there = next((kind for node, kind in _NODES.items() if Path(node).exists()), None)
    if there is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    built = torch.version.cuda or torch.version.hip or hasattr(torch, "npu")
    reason = "its driver is missing or too old for it" if built else "it is built for another device or for none"
    return f"it trains on the CPU, and there is {there} that torch {torch.__version__} cannot use: {reason}"
