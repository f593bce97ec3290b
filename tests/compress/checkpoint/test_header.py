"""Weight files whose headers lie, and files that are something else."""

import os
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from shards import TWO, entry, refusal, write_shard

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError

MEGABYTE = 1 << 20


# --- fault 6: headers that lie


LIES: dict[str, tuple[Any, bytes, int | None, str]] = {
    # name: header, data, length of the header as claimed, what the message says
    "length beyond the file": (TWO, bytes(16), 5000, "is truncated: its header claims 5000 bytes"),
    "length beyond 100 MB": (TWO, bytes(16), 2**63, "claims 9,223,372,036,854,775,808 bytes, more than 100,000,000"),
    "not JSON": (b'{"a": oops}', b"", None, "model.safetensors':1:7: Expecting value"),
    "hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 8, 12)}, bytes(12), None, "tensor 'b' .* a hole"),
    "hole at the start": ({"a": entry("U8", [4], 4, 8)}, bytes(8), None, "tensor 'a' .* a hole"),
    "overlap": (
        {"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 4, 12)},
        bytes(12),
        None,
        "tensor 'b' .* an overlap",
    ),
    "size is not that of shape and dtype": (
        {"a": entry("F32", [3], 0, 8)},
        bytes(8),
        None,
        "tensor 'a': F32 .3. takes 12 bytes",
    ),
    "overflow": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8), None, "tensor 'a': its shape overflows"),
    "overflow by many": ({"a": entry("U8", [2**62] * 9999, 0, 8)}, bytes(8), None, "tensor 'a': its shape overflows"),
    "overflow by product": ({"a": entry("U8", [2**32, 2**32], 0, 0)}, b"", None, "tensor 'a': its shape overflows"),
    "negative shape": ({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8), None, "tensor 'a': negative size -1"),
    "negative offset": ({"a": entry("U8", [8], -8, 0)}, bytes(8), None, "tensor 'a': negative"),
    "offsets reversed": ({"a": entry("U8", [8], 8, 0)}, bytes(8), None, "tensor 'a': negative"),
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, bytes(8), None, "tensor 'a': unknown dtype 'F31'"),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, bytes(2), None, "tensor 'a': 12 bits are not a whole number"),
    "trailing bytes": (TWO, bytes(19), None, "3 trailing bytes after 'b'"),
    "not an object": ({"a": [1]}, b"", None, "tensor 'a': is not described by an object"),
    "no dtype": ({"a": {"shape": [1]}}, b"", None, "tensor 'a': has no dtype"),
    "shape of text": ({"a": {"dtype": "U8", "shape": "8"}}, b"", None, "tensor 'a': its shape is not a list"),
    "shape of truth": ({"a": entry("U8", [True], 0, 1)}, b"x", None, "tensor 'a': its shape is not a list"),
    "one offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x", None, "not two integers"),
    "fraction": ({"a": entry("U8", [1], 0, 1.0)}, b"x", None, "not two integers"),  # type: ignore[arg-type]
    "a list": (b"[1, 2]", b"", None, "does not begin with '{'"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__ is not an object of strings"),
    "nesting": (b'{"a":' + b"[" * 200_000, b"", None, "nested too deeply"),
    "lone surrogate": (b'{"\\ud800": {}}', b"", None, "not valid Unicode"),
}


def traced_refusal(model: Path) -> tuple[str, int]:
    """The message, and the bytes that were allocated on the way at most."""
    tracemalloc.start()
    try:
        return refusal(model), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies(model: Path, lie: str) -> None:
    header, data, length, expected = LIES[lie]
    write_shard(model / "model.safetensors", header, data, length)
    start = time.perf_counter()
    message, memory = traced_refusal(model)
    assert re.search(expected, message)
    assert "model.safetensors" in message
    assert time.perf_counter() - start < 5
    assert memory < 10 * MEGABYTE


def test_a_header_that_is_too_long_is_not_read(model: Path) -> None:
    """The file is as long as it claims, so only the limit protects the memory."""
    path = model / "model.safetensors"
    write_shard(path, b"{", length=300 * MEGABYTE)
    os.truncate(path, 400 * MEGABYTE)
    message, memory = traced_refusal(model)
    assert "more than 100,000,000" in message
    assert memory < MEGABYTE


# --- fault 7: one name, two places


def test_duplicate_key_in_a_header(model: Path) -> None:
    write_shard(
        model / "model.safetensors",
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        bytes(8),
    )
    message = refusal(model)
    assert "'a' occurs twice" in message
    assert "[0, 4]" in message
    assert "[4, 8]" in message


# --- fault 8: files that are something else


def test_truncated_shard(model: Path) -> None:
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    size = path.stat().st_size
    os.truncate(path, size - 5)
    assert f"expected {size} bytes, the file has {size - 5}" in refusal(model)
    os.truncate(path, 7)
    assert "expected at least 8 bytes, it has 7" in refusal(model)
    os.truncate(path, 0)
    assert "expected at least 8 bytes, it has 0" in refusal(model)


def test_lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match="git-LFS pointer") as caught:
        Checkpoint.open(model)
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("start", ["<!DOCTYPE html>", "\n <html>", "<?xml version='1.0'?>"])
def test_error_page(model: Path, start: str) -> None:
    (model / "model.safetensors").write_text(start + "<body>404 Not Found</body>")
    assert "is an HTML page" in refusal(model)


def test_shard_is_a_pipe_or_a_folder(model: Path) -> None:
    os.mkfifo(model / "model.safetensors")
    assert "is not a regular file" in refusal(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    assert "is not a regular file" in refusal(model)


# --- fault 18: hostile names


@pytest.mark.parametrize("name", ["\x1b[2J", "[/x]", "a\nb", "[red]", "\u202e"])
def test_names_are_escaped(tmp_path: Path, name: str) -> None:
    model = tmp_path / name.replace("/", "")
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_shard(model / "model.safetensors", {name: entry("F31", [1], 0, 1)}, b"x")
    message = refusal(model)
    assert repr(name) in message
    assert message.isprintable()
