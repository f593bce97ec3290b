"""Where the tensors are worked on."""

import torch

from llmpare.compress import memory
from llmpare.compress.errors import UsageError
from llmpare.compress.estimate import PROCESS


def find(name: str) -> torch.device:
    """The device of that name; 'auto' is CUDA where there is one. Raises UsageError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError(f"unknown device {name!r}", "--device takes auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f"--device {name}: torch sees {count} CUDA devices", "use --device cpu, or a torch for CUDA")
    return torch.device(name)


def room(device: torch.device) -> int:
    """Bytes a run on this device can have, counted like the estimate of a plan."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + PROCESS  # the process itself is not on the device
    return memory.available() + memory.resident()


def peak(device: torch.device) -> int | None:
    """The most device memory that was allocated, in bytes; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def name(device: torch.device) -> str:
    """What the report calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
