"""What the tests of the fault table share: what a command left, and how things are broken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

from llmpare.compress.checkpoint.read import Checkpoint

Llmpare = Callable[[list[str]], tiny.Ended]
StopAfter = Callable[[int, list[str]], None]

DOWN_1 = "model.layers.1.mlp.down_proj.weight"


def none(out: Path) -> bool:
    """Whether a command has left nothing behind."""
    return not out.parent.exists() or os.listdir(out.parent) == []


def resumable(out: Path) -> bool:
    """Whether there is an unfinished output, and nothing else: with a journal, or whole and only to be renamed."""
    if tiny.names(out.parent) != ["w4.partial"]:
        return False
    return not {"journal.jsonl", "manifest.json"}.isdisjoint(os.listdir(out.parent / "w4.partial"))


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return found


def refused(llmpare: Llmpare, command: list[str], code: int, *said: str) -> None:
    """The command fails with that code and says all that, with nothing on stdout."""
    ended = llmpare(command)
    assert ended.code == code, ended.err
    assert ended.out == ""
    for part in said:
        assert part in ended.err
    assert all(line.isprintable() for line in ended.err.splitlines())


def refused_by_all(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, code: int, *said: str) -> None:
    """quantize, plan and inspect all refuse the model, and leave nothing."""
    for command in (tiny.quantize(model, out, text), ["plan", str(model)], ["inspect", str(model)]):
        refused(llmpare, command, code, *said)
    assert none(out)


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **entries}))


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to, a link counting for itself."""
    status = os.lstat(path)
    return status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def place(folder: Path, tensor: str) -> int:
    """Where in model.safetensors a tensor begins."""
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.tensors[tensor].start


def with_value(value: float) -> tiny.Change:
    """Puts a value into one place of a weight."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[5] = value
        return weight

    return change
