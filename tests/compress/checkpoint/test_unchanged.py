"""Fault 40: weight files that change, vanish or fail while they are used."""

import os
from pathlib import Path

import pytest
from shards import TWO, write_shard

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError


def test_unchanged(model: Path) -> None:
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        checkpoint.read("a")
        checkpoint.read("a")
        checkpoint.check_unchanged()


def test_shard_rewritten_in_place(model: Path) -> None:
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        checkpoint.read("b")
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        with pytest.raises(InputError, match=r"model.safetensors': tensor 'b' changed"):
            checkpoint.read("b")
        os.utime(path, ns=(1, 1))
        with pytest.raises(InputError, match=r"model.safetensors' changed"):
            checkpoint.check_unchanged()


def test_shard_replaced_or_removed_or_cut(model: Path) -> None:
    path, other = model / "model.safetensors", model / "other"
    write_shard(path, TWO, bytes(16))
    write_shard(other, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        status = path.stat()
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(other, path)
        with pytest.raises(InputError, match="changed"):
            checkpoint.check_unchanged()
        path.unlink()
        with pytest.raises(InputError, match="No such file"):
            checkpoint.check_unchanged()
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        os.truncate(path, 100)
        with pytest.raises(InputError, match="it has 100"):
            checkpoint.read("b")


def test_unreadable_shard(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is named, with the system's words for it."""
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:

        def failing(*_: object) -> int:
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(InputError, match=r"cannot read .*model.safetensors': Input/output error"):
            checkpoint.read("a")
