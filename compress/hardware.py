"""What this machine computes on and in, as the operating system tells it; no torch, so that plans can ask."""

import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llmpare.compress.errors import UsageError

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as --dtype and as safetensors spell them

# What /proc/cpuinfo calls the instructions that multiply in half precision.
_HALVES = {"BF16": {"avx512_bf16", "amx_bf16", "bf16"}, "F16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


def device_kind(asked: str) -> str:
    """'cpu' or 'cuda': the kind of device that --device means here. For 'auto' torch has the last word."""
    if asked != "auto":
        return asked.partition(":")[0]
    return "cuda" if torch_for_gpus() and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


@cache
def torch_for_gpus() -> bool:
    """Whether the torch that is installed was built for CUDA."""
    torch = find_spec("torch")
    folders = torch.submodule_search_locations if torch else None
    return any(next(Path(folder, "lib").glob("*torch_cuda.*"), None) for folder in folders or ())


def forward_dtype(asked: str, stored: str, device: str) -> str:
    """The precision of forward passes, as safetensors spells it: the one asked for; by default that of the weights.

    Processors without instructions for half precision take it number by number, eight times as long as float32,
    which holds every number of the two: there the default is float32. stored: of most weights. Raises UsageError.
    """
    if asked == "auto":
        return "F32" if device == "cpu" and not multiplies(stored) else stored
    if asked not in DTYPES:
        raise UsageError(f"unknown dtype {asked!r}", f"--dtype takes auto, {', '.join(DTYPES)}")
    return DTYPES[asked]


def multiplies(dtype: str) -> bool:
    """Whether the processor multiplies in this precision."""
    return dtype not in _HALVES or bool(_HALVES[dtype] & _features())


def processor() -> str:
    """What the system calls it; its architecture where the system has no name."""
    return _facts().get("model name") or platform.machine()


@cache
def _features() -> frozenset[str]:
    """The processor's instruction sets; none where the system does not list them."""
    name = "flags" if platform.machine() in ("x86_64", "AMD64", "i686") else "Features"
    return frozenset(_facts().get(name, "").split())


def _facts() -> dict[str, str]:
    """What the system lists of the first processor; nothing where it keeps no such list."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
