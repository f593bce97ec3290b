"""The engines there are: one file each beside this one, and one line below. No engine is imported here."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate.speed.engine import Case

_HERE = "llmpare.compress.evaluate.speed.engines"


def _folder(model: Path) -> str:
    found = (model / "config.json").is_file() and any(model.glob("*.safetensors"))
    return "" if found else "it runs folders with config.json and safetensors"


def _exported(model: Path) -> str:
    found = (model / "genai_config.json").is_file()
    return "" if found else "it runs folders that onnxruntime-genai's model builder wrote, with genai_config.json"


def _gguf(model: Path) -> str:
    found = model.suffix == ".gguf" or len(list(model.glob("*.gguf"))) == 1
    return "" if found else "it runs .gguf files, or folders that hold one"


@dataclass(frozen=True)
class Entry:
    """An engine. module: where its `load` is. needs: what must be importable. install: how to get it.

    unsuited: why it cannot run a checkpoint, or ''. base: its own settings. variations: names of cases.VARIATIONS
    that it can run. batched: whether it runs more than one sequence at once.
    """

    module: str
    needs: tuple[str, ...]
    install: str
    unsuited: Callable[[Path], str]
    base: Case
    variations: tuple[str, ...] = ()
    batched: bool = True


ENGINES: dict[str, Entry] = {
    "transformers": Entry(
        f"{_HERE}.transformers",
        ("transformers",),
        "pip install transformers",
        _folder,
        Case(1, 1, 2),
        ("static", "off", "compiled", "eager", "flash_attention_2", "continuous"),
    ),
    "vllm": Entry(
        f"{_HERE}.vllm",
        ("vllm",),
        "pip install vllm, in an environment of its own: it pins torch and transformers",
        _folder,
        Case(1, 1, 2, cache="paged", compiled=True),
        ("continuous",),
    ),
    "onnxruntime": Entry(
        f"{_HERE}.onnxruntime",
        ("onnxruntime_genai",),
        "pip install onnxruntime-genai (onnxruntime-genai-cuda for CUDA)",
        _exported,
        Case(1, 1, 2, cache="static"),
    ),
    "llama.cpp": Entry(
        f"{_HERE}.llama_cpp",
        ("llama_cpp",),
        "pip install llama-cpp-python",
        _gguf,
        Case(1, 1, 2, cache="static"),
        batched=False,
    ),
}


def find(name: str, model: Path) -> Entry:
    """The engine of that name, which is installed and can run the checkpoint.

    Raises UsageError for an engine that is unknown or not installed, InputError for a checkpoint that does not suit.
    """
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, 1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown engine {name!r}", f"{guess}--engines takes {', '.join(ENGINES)}")
    entry = ENGINES[name]
    missing = [package for package in entry.needs if find_spec(package) is None]
    if missing:
        raise UsageError(f"the engine {name} is not installed: no module {missing[0]}", entry.install)
    if reason := entry.unsuited(model):
        raise InputError(f"the engine {name} cannot run {model}: {reason}", "leave it out of --engines")
    return entry
