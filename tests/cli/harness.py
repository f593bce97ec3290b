"""`llmpare` as a process, with an engine that only pretends: `python harness.py BEHAVIOUR [ARGUMENTS…]`.

What is under test is how the process ends and what it prints, which must not depend on real work.
"""

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import samples

from llmpare.cli.exits import main
from llmpare.compress import errors
from llmpare.compress.progress import Progress
from llmpare.compress.request import QuantizeRequest

NOISE = "\x1b[2J[/x]\nüber"


def finish(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    report = samples.report()
    report["request"] |= {"model": request.model, "out": str(request.out)}
    progress.phase("compressing")
    for index in range(3):
        progress.block(index, 3, {"relative_error": 0.00123, "seconds": 0.5})
    progress.warn(f"odd name {NOISE}")
    return report


def fail_gate(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    report = finish(request, progress)
    report["gates"] = [{"name": "max-kl", "limit": 0.001, "value": float("nan"), "passed": False}]
    return report | {"passed": False}


def hang(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    """Works until it is stopped; the context manager's exit is where the real engine leaves its journal."""
    try:
        progress.phase("working")
        time.sleep(60)
    finally:
        Path(request.out).with_suffix(".closed").touch()
    raise AssertionError("nobody stopped it")


def hang_twice(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    """Does not let itself be stopped the first time."""
    try:
        progress.phase("working")
        time.sleep(60)
    finally:
        progress.phase("closing")
        time.sleep(60)
    raise AssertionError("nobody stopped it")


class OutOfMemoryError(RuntimeError):
    """What torch, which is not needed here, raises for a GPU has this name."""


RAISED: dict[str, Exception] = {
    "usage": errors.UsageError("no such thing", "do the other thing"),
    "input": errors.InputError(f"bad file {NOISE}", "fetch it again"),
    "output": errors.OutputError("cannot write"),
    "memory": errors.MemoryLimitError("too big"),
    "busy": errors.BusyError("pid 1 is at it"),
    "python-memory": MemoryError(),
    "torch-memory": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "device-memory": OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "disk-full": OSError(28, "No space left on device", "out/w4.partial/x"),
    "bug": KeyError("surprise"),
    "os-bug": OSError(9, "Bad file descriptor"),
}


def raising(error: Exception) -> Any:
    def run(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
        raise error

    return run


BEHAVIOURS = {"finish": finish, "fail-gate": fail_gate, "hang": hang, "hang-twice": hang_twice}
BEHAVIOURS |= {name: raising(error) for name, error in RAISED.items()}

if __name__ == "__main__":
    engine = ModuleType("llmpare.compress.run")
    vars(engine)["run_quantize"] = BEHAVIOURS[sys.argv.pop(1)]
    sys.modules[engine.__name__] = engine
    sys.exit(main())
