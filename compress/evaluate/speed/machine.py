"""What the device can do at best, measured: memory bandwidth and arithmetic in the model's number format."""

from collections.abc import Callable
from typing import Any

import torch

from llmpare.compress import devices, memory
from llmpare.compress.evaluate.speed.timing import marks

_SECONDS = 0.5  # for each of the programs below
_LARGE = {"cpu": 2**28, "cuda": 2**30}  # bytes per buffer: far more than any cache holds
_ORDER = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Bandwidth in GB/s, arithmetic in GFLOP/s, and the name of the device.

    The best of several repetitions, since a roof is what can be reached.
    """
    return {
        "bandwidth_gb_s": _bandwidth(device) / 1e9,
        "gflops": _arithmetic(device, dtype) / 1e9,
        "device": devices.name(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _bandwidth(device: torch.device) -> float:
    """Bytes per second over large buffers: the best of copying, of STREAM's triad a = b + s·c, and of reading.

    What a store has to read first is not counted (as in STREAM), so copying and triad come out lower than reading
    on most CPUs; decoding mostly reads.
    """
    room = memory.available() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    size = min(_LARGE[device.type], room // 16) // 4  # numbers of 4 bytes
    a, b, c = (torch.full((size,), float(fill), device=device) for fill in range(3))
    programs: list[tuple[int, Callable[[], object]]] = [
        (2, lambda: a.copy_(b)),
        (3, lambda: torch.add(b, c, alpha=0.5, out=a)),
        (1, lambda: b.sum()),
    ]
    return max(4 * size * streams / _best(program, device) for streams, program in programs)


def _arithmetic(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    order = _ORDER[device.type]
    a = torch.ones(order, order, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2 * order**3 / _best(lambda: torch.mm(a, a, out=out), device)


def _best(program: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest repetition, after one that does not count; at least three, and for half a second."""
    program()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _SECONDS:
        clock = marks(device)
        clock.mark()
        program()
        clock.mark()
        seconds += clock.intervals()
    return min(seconds)
