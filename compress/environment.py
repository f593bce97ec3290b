"""What every report says of the run itself: what it took, and what it ran on."""

import platform
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from llmpare.compress import devices, memory
from llmpare.compress.clock import Clock
from llmpare.compress.version import VERSION


@dataclass(frozen=True)
class Prediction:
    """What a run was said to take: bytes of memory and of weight files, and seconds once its first block was done."""

    memory: int
    files: int
    seconds: float | None


def cost(
    clock: Clock,
    device: torch.device,
    predicted: Prediction | None = None,
    *,
    read: int | None = None,
    written: int | None = None,
) -> dict[str, Any]:
    """The report's `cost` section. read: bytes of the source, as often as read. written: bytes of weight files."""
    seconds = None if predicted is None else predicted.seconds
    return {
        "seconds": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        "total_seconds": round(clock.total(), 3),
        "peak_rss_bytes": memory.peak_resident(),
        "peak_device_bytes": devices.peak(device),
        "weights_read_bytes": read,
        "weight_files_bytes": written,
        "predicted_seconds": None if seconds is None else round(seconds, 3),
        "predicted_memory_bytes": None if predicted is None else predicted.memory,
        "predicted_weight_files_bytes": None if predicted is None else predicted.files,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The report's `environment` section."""
    return {
        "llmpare": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": devices.name(device),
        "threads": torch.get_num_threads(),
    }
