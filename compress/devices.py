"""Where the tensors are worked on."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from llmpare.compress import hardware, memory
from llmpare.compress.clock import Clock
from llmpare.compress.errors import LlmpareError, UsageError
from llmpare.compress.estimate import process
from llmpare.compress.progress import Progress

_Found = TypeVar("_Found")


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
        return free + process()  # the process itself is not on the device
    return memory.available() + memory.resident()


def limit(device: torch.device, most: int | None) -> None:
    """Has the device refuse what this process asks for beyond `most` bytes, if it can."""
    if device.type == "cuda" and most is not None:
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def release() -> None:
    """Gives back what nothing holds any more, here and on CUDA devices, which other processes share."""
    gc.collect()
    memory.trim()
    torch.cuda.empty_cache()


def peak(device: torch.device) -> int | None:
    """The most device memory that was allocated, in bytes; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def clock(device: torch.device) -> Clock:
    """A clock that waits for what the device has still to do."""
    return Clock((lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None)


def name(device: torch.device) -> str:
    """What the report calls the device; of a CPU with the number of threads, which its speed depends on as much."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{hardware.processor()}, {threads} thread{'s' * (threads != 1)}"


def fitting(
    work: Callable[[int], _Found], batch: int, progress: Progress, failure: Callable[[int, Exception], LlmpareError]
) -> _Found:
    """work(batch), `batch` being windows at a time; once more with half of them if the device runs out of memory.

    failure: from the windows at a time and the error, what to raise if that does not help either.
    """
    try:
        return work(batch)
    except RuntimeError as error:
        if not memory.device_exhausted(error):
            raise
        if batch == 1:
            raise failure(batch, error) from error
        # as long as the error is handled, its traceback holds on to the tensors of that attempt
    release()
    half = batch // 2
    progress.warn(f"the device ran out of memory with {batch} windows at a time, trying {half}")
    try:
        return work(half)
    except RuntimeError as error:
        if not memory.device_exhausted(error):
            raise
        raise failure(half, error) from error
