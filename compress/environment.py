"""What every report says of the run itself: what it took, and what it ran on."""

import platform
from typing import Any

import torch
import transformers

from llmpare.compress import devices, memory
from llmpare.compress.clock import Clock
from llmpare.compress.version import VERSION


def cost(
    clock: Clock, device: torch.device, predicted: int | None = None, weights_read: int | None = None
) -> dict[str, Any]:
    """The report's `cost` section. predicted: bytes of memory. weights_read: bytes of the source, as often as read."""
    return {
        "seconds": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        "total_seconds": round(clock.total(), 3),
        "peak_rss_bytes": memory.peak_resident(),
        "peak_device_bytes": devices.peak(device),
        "predicted_memory_bytes": predicted,
        "weights_read_bytes": weights_read,
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
