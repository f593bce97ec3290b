"""Writes a safetensors checkpoint tensor by tensor, in any order, to places that are known before the work begins.

The same list of tensors gives the same files, byte for byte. safetensors' own `save_file` needs all tensors at once,
writes mode 0600, never syncs, and with two metadata keys its bytes differ from run to run.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmpare.compress.checkpoint.files import (
    Closing,
    allocate,
    create,
    read_at,
    sha256_at,
    shown,
    sync_folder,
    write_at,
    write_file,
    writing,
)
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.read import INDEX, SINGLE
from llmpare.compress.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. dtype as in safetensors: 'BF16', 'I32', …"""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class _Shard:
    path: Path
    fd: int


@dataclass(frozen=True)
class _Place:
    shard: _Shard
    offset: int
    size: int


class CheckpointWriter(Closing):
    """The weight files of a checkpoint in `folder`, laid out in the order of `specs`.

    A file that exists with the very header it would get is taken up as it is, so that tensors an earlier run wrote
    need not be written again; any other weight file of ours in the folder is replaced or removed. The disk space is
    reserved at once. Methods raise OutputError when the file system does. `write` and `read` are safe in any thread.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        shards = _shards(specs, max_shard_bytes)
        self._folder = folder
        self._shards: list[_Shard] = []
        self._places: dict[str, _Place] = {}
        self._touched: set[_Shard] = set()
        with writing(folder):
            _remove_leftovers(folder, keep={*shards, INDEX} if len(shards) > 1 else {*shards})
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            for name, group in shards.items():
                self._add_shard(folder / name, group)
            if len(shards) > 1:
                write_file(folder / INDEX, _index(shards))
            on_failure.pop_all()

    def _add_shard(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header = _header(specs)
        size = len(header) + sum(spec.nbytes for spec in specs)
        with writing(path):
            fd = _reopen(path, header, size)
            shard = _Shard(path, _start(path, header, size) if fd is None else fd)
        self._shards.append(shard)
        self._touched.add(shard)  # a header that an earlier run wrote may not be durable yet either
        offset = len(header)
        for spec in specs:
            if spec.name in self._places:
                raise ValueError(f"tensor {spec.name!r} is to be written twice")
            self._places[spec.name] = _Place(shard, offset, spec.nbytes)
            offset += spec.nbytes

    def write(self, name: str, data: "ReadableBuffer") -> str:
        """Puts the bytes of one tensor in their place. Returns their sha256 in hexadecimal.

        Raises ValueError when `data` is not contiguous or not of the size that was announced.
        """
        place = self._places[name]
        whole = memoryview(data)
        view = whole.cast("B") if whole.nbytes else memoryview(b"")  # an empty buffer cannot be cast
        if view.nbytes != place.size:
            raise ValueError(f"tensor {name!r} has {view.nbytes} bytes, {place.size} were announced")
        with writing(place.shard.path):
            write_at(place.shard.fd, place.offset, view)
        # Only now: a sync in another thread that saw the mark before the bytes would take it away.
        self._touched.add(place.shard)
        return hashlib.sha256(view).hexdigest()

    def read(self, name: str) -> bytearray:
        """The bytes in the place of one tensor."""
        place = self._places[name]
        return read_at(place.shard.fd, place.offset, place.size, place.shard.path)

    def digest(self, name: str) -> str:
        """The sha256 of those bytes, in hexadecimal; large tensors never are in memory as a whole."""
        place = self._places[name]
        return sha256_at(place.shard.fd, place.offset, place.size, place.shard.path)

    def sync(self) -> None:
        """Makes all that was written so far durable."""
        for shard in sorted(self._touched, key=lambda shard: shard.path.name):
            self._touched.discard(shard)
            with writing(shard.path):
                os.fsync(shard.fd)
        with writing(self._folder):
            sync_folder(self._folder)

    def close(self) -> None:
        """Closes the files, without making them durable."""
        while self._shards:
            os.close(self._shards.pop().fd)


def weight_files(specs: Sequence[TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, int]:
    """The files that a CheckpointWriter makes for these tensors, with their sizes in bytes."""
    shards = _shards(specs, max_shard_bytes)
    sizes = {name: len(_header(group)) + sum(spec.nbytes for spec in group) for name, group in shards.items()}
    return sizes if len(sizes) == 1 else {**sizes, INDEX: len(_index(shards))}


def _shards(specs: Sequence[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    groups = _group(specs, limit)
    return dict(zip(_shard_names(len(groups)), groups, strict=True))


def _group(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one by itself."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    return groups


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _remove_leftovers(folder: Path, keep: Iterable[str]) -> None:
    """A shard of another layout, left by a killed run, would be published together with ours."""
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for name in sorted(os.listdir(folder)):
        if ours.fullmatch(name) and name not in keep:
            os.unlink(folder / name)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """Length and header of a shard, padded so that the tensors begin at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _reopen(path: Path, header: bytes, size: int) -> int | None:
    """The file at `path`, if it has this header and size."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise OutputError(f"{shown(path)} is not a regular file", "--restart begins afresh")
    if status.st_size == size and os.pread(fd, len(header), 0) == header:
        return fd
    os.close(fd)
    return None


def _start(path: Path, header: bytes, size: int) -> int:
    fd = create(path)
    allocate(fd, size)
    write_at(fd, 0, header)
    return fd


def _index(shards: Mapping[str, Sequence[TensorSpec]]) -> bytes:
    weight_map = {spec.name: name for name, group in shards.items() for spec in group}
    total = sum(spec.nbytes for group in shards.values() for spec in group)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
