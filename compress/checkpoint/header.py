"""The safetensors header: what a file says it holds, believed only where it is consistent with itself and the file.

Layout: 8 bytes length of the header (little endian), the header (JSON, padded with spaces), then the tensors. Every
rule checked here is one that some loader breaks on: https://github.com/huggingface/safetensors#format
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from llmpare.compress.checkpoint.files import clipped, parse_json, read_at, shown
from llmpare.compress.errors import InputError

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
MAX_COUNT = 2**63 - 1  # the largest number of elements or bytes a loader can count

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. start, end: bytes in the shard file, header included."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises ValueError for an unknown dtype, a negative size, overflow and broken bytes."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {shown(dtype)}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        if size < 0:
            raise ValueError(f"negative size {size} in its shape")
        bits *= size
        if bits > 8 * MAX_COUNT:  # stops early: a product of many huge sizes is expensive in itself
            raise ValueError("its shape overflows 64 bits")
    if bits % 8:
        raise ValueError(f"{bits} bits are not a whole number of bytes")
    return bits // 8


def read_header(fd: int, path: Path) -> list[TensorInfo]:
    """The tensors of the safetensors file `path`, open at `fd`, in the order of their bytes.

    Reads the header only. Raises InputError naming the file, the tensor and the reason.
    """
    size = os.fstat(fd).st_size
    _refuse_other_content(read_at(fd, 0, min(size, 64), path), path)
    if size < 8:
        raise InputError(f"{shown(path)} is truncated: expected at least 8 bytes, it has {size}", _FETCH_AGAIN)
    length = int.from_bytes(read_at(fd, 0, 8, path), "little")
    if length > MAX_HEADER:
        raise InputError(f"{shown(path)}: its header claims {length:,} bytes, more than {MAX_HEADER:,}", _FETCH_AGAIN)
    base = 8 + length
    if base > size:
        raise InputError(
            f"{shown(path)} is truncated: its header claims {length} bytes, so expected at least {base}, "
            f"the file has {size}",
            _FETCH_AGAIN,
        )
    text = read_at(fd, 8, length, path)
    if not text.startswith(b"{"):
        raise InputError(f"{shown(path)}: its header does not begin with '{{'", _FETCH_AGAIN)
    header = parse_json(text, path, unique=True)
    _check_metadata(header.pop("__metadata__", {}), path)
    tensors = [_tensor(name, entry, base, path) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_layout(tensors, base, size, path)
    return tensors


_FETCH_AGAIN = "fetch the file again"


def _refuse_other_content(start: bytes | bytearray, path: Path) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{shown(path)} is a git-LFS pointer, not the file itself",
            "run `git lfs pull` in the model's folder",
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{shown(path)} is an HTML page, not a tensor file", _FETCH_AGAIN)


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{shown(path)}: __metadata__ is not an object of strings")


def _tensor(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    """One entry of the header, checked by itself."""

    def wrong(reason: str) -> InputError:
        return InputError(f"{shown(path)}: tensor {shown(name)}: {reason}")

    if not is_unicode(name):
        raise wrong("its name is not valid Unicode")
    if not isinstance(entry, dict):
        raise wrong("is not described by an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise wrong("has no dtype")
    if not _is_integers(shape):
        raise wrong("its shape is not a list of integers")
    if not _is_integers(offsets) or len(offsets) != 2:
        raise wrong("its data_offsets are not two integers")
    begin, end = offsets
    if begin < 0 or end < begin:
        raise wrong(f"negative size or offset in data_offsets {clipped(offsets)}")
    try:
        expected = tensor_bytes(dtype, shape)
    except ValueError as error:
        raise wrong(str(error)) from error
    if end - begin != expected:
        raise wrong(f"{dtype} {clipped(shape)} takes {expected} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), path.name, base + begin, base + end)


def is_unicode(name: str) -> bool:
    """Whether a name that came out of JSON is text: a lone surrogate, which JSON allows, cannot be written."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in value)  # True and False are ints too


def _check_layout(tensors: Sequence[TensorInfo], base: int, size: int, path: Path) -> None:
    """The tensors must cover the file from the header to its end, without hole and without overlap."""
    furthest = max(tensors, key=lambda tensor: tensor.end, default=None)
    if furthest is not None and furthest.end > size:
        raise InputError(
            f"{shown(path)} is truncated: tensor {shown(furthest.name)} ends at byte {furthest.end}, "
            f"so expected {furthest.end} bytes, the file has {size}",
            _FETCH_AGAIN,
        )
    position, previous = base, "the header"
    for tensor in tensors:
        if tensor.start != position:
            what = "a hole" if tensor.start > position else "an overlap"
            raise InputError(
                f"{shown(path)}: tensor {shown(tensor.name)} begins at byte {tensor.start}: {what}, "
                f"{previous} ends at {position}"
            )
        position, previous = tensor.end, shown(tensor.name)
    if position != size:
        raise InputError(
            f"{shown(path)}: {size - position} trailing bytes after {previous}: "
            f"expected {position} bytes, the file has {size}"
        )
