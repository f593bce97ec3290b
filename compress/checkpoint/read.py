"""A model folder, opened strictly: everything that can be known from headers is checked before any weight is read.

File names that come out of the index are judged as names. What they point to is not: in the hub's cache every file
is a symbolic link into a folder of blobs.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmpare.compress.checkpoint.files import (
    Closing,
    open_regular,
    read_at,
    read_json,
    reading,
    sha256_at,
    sha256_file,
    shown,
)
from llmpare.compress.checkpoint.header import TensorInfo, is_unicode, read_header
from llmpare.compress.errors import InputError, UsageError

__all__ = ["CONFIG", "DENSE", "INDEX", "QUANTIZATION", "SINGLE", "Checkpoint", "TensorInfo", "quantization_of"]

CONFIG = "config.json"
QUANTIZATION = ("quantization_config", "compression_config")  # of config.json; the latter in old compressed-tensors
DENSE = "dense"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG = 8_000_000  # bytes
MAX_INDEX = 100_000_000
LISTED = 5  # names a message lists

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (
    *_PICKLES, ".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx", ".onnx_data", ".ot", ".tflite",
)  # fmt: skip
# Our own output may be the next run's input; what describes the former does not describe the latter.
_OURS = {"manifest.json", "journal.jsonl", "lock", "report.json", "report.md", "report.html"}

_CONVERT = "convert it to safetensors first, for example at https://huggingface.co/spaces/safetensors/convert"


@dataclass(frozen=True)
class _Shard:
    path: Path
    fd: int
    identity: tuple[int, int, int]


class Checkpoint(Closing):
    """An open model folder. Made by `open`; close it, or use it as a context manager.

    config: config.json as it is. tensors: by name, in the order of shard and offset. files: every other file to carry
    over, as POSIX paths relative to the folder, sorted. digests: the sha256 of every tensor that was read.
    bytes_read: of tensors, each as often as it was read.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], shards: dict[str, _Shard], tensors: dict[str, TensorInfo]
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.files = _other_files(folder)
        self.digests: dict[str, str] = {}
        self.bytes_read = 0
        self._shards = shards
        self._beside = {path: _identity(os.stat(path)) for path in (folder / name for name in (CONFIG, *self.files))}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Reads config, index and headers, and checks them against each other and the files.

        Raises UsageError when `folder` is not a folder, InputError naming file, tensor and reason for all else.
        """
        if not os.path.isdir(folder):
            raise UsageError(f"{shown(folder)}: expected a folder with {CONFIG}")
        if not os.path.lexists(folder / CONFIG):
            raise InputError(f"{shown(folder)} has no {CONFIG}: expected a folder with {CONFIG}")
        config = read_json(folder / CONFIG, limit=MAX_CONFIG)
        names, index = _shard_names(folder)
        with ExitStack() as on_failure:
            shards: dict[str, _Shard] = {}
            tensors: dict[str, TensorInfo] = {}
            for name in names:
                path = folder / name
                fd = open_regular(path)
                on_failure.callback(os.close, fd)
                shards[name] = _Shard(path, fd, _identity(os.fstat(fd)))
                for tensor in read_header(fd, path):
                    if tensor.name in tensors:
                        both = f"{shown(tensors[tensor.name].shard)} and in {shown(name)}"
                        raise InputError(f"{shown(folder)}: tensor {shown(tensor.name)} is in {both}")
                    tensors[tensor.name] = tensor
            if index is not None:
                _check_index(index, tensors, folder / INDEX)
            checkpoint = cls(folder, config, shards, tensors)
            on_failure.pop_all()
        return checkpoint

    def file_digests(self) -> dict[str, str]:
        """The sha256 of every file to carry over, by name."""
        return {name: sha256_file(self.folder / name) for name in self.files}

    def read(self, name: str) -> bytearray | memoryview:
        """The bytes of one tensor, in memory of their own; safe in any thread.

        Raises InputError when the file ends early, and when a tensor that was read before has changed since.
        """
        tensor = self.tensors[name]
        shard = self._shards[tensor.shard]
        data = read_at(shard.fd, tensor.start, tensor.nbytes, shard.path)
        self.bytes_read += len(data)
        digest = hashlib.sha256(data).hexdigest()
        if self.digests.setdefault(name, digest) != digest:
            raise InputError(f"{shown(shard.path)}: tensor {shown(name)} changed while it was in use", _LEAVE_ALONE)
        return data

    @property
    def scheme(self) -> str:
        """How the weights are stored."""
        return DENSE

    @property
    def decoding(self) -> int:
        """Bytes that reading a tensor takes beside the tensor, at most."""
        return 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def digest(self, name: str) -> str:
        """The sha256 of a tensor that was read, as it is on disk."""
        return self.digests[name]

    def hash(self) -> None:
        """Completes `digests` with those of tensors that were not read, and holds none of them."""
        self.hash_all(self.tensors)

    def hash_all(self, names: Iterable[str]) -> None:
        """The same for some tensors."""
        for name in set(names) - self.digests.keys():
            tensor = self.tensors[name]
            shard = self._shards[tensor.shard]
            self.digests[name] = sha256_at(shard.fd, tensor.start, tensor.nbytes, shard.path)

    def check_unchanged(self) -> None:
        """Raises InputError when a file is no longer the one that was opened: size, time or inode differ."""
        shards = {shard.path: shard.identity for shard in self._shards.values()}
        for path, identity in {**shards, **self._beside}.items():
            with reading(path):
                now = _identity(os.stat(path))
            if now != identity:
                raise InputError(f"{shown(path)} changed while it was in use", _LEAVE_ALONE)

    def close(self) -> None:
        """Closes the shards. Nothing can be read afterwards."""
        while self._shards:
            _, shard = self._shards.popitem()
            os.close(shard.fd)


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What config.json says of quantization; None if it says nothing."""
    return next((found for key in QUANTIZATION if (found := config.get(key)) is not None), None)


_LEAVE_ALONE = "run again, and leave the model folder alone meanwhile"


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shard files, sorted, and the index if there is one: tensor name → shard name.

    A single file goes before an index, as in transformers.
    """
    if os.path.lexists(folder / SINGLE):
        return [SINGLE], None
    if not os.path.lexists(folder / INDEX):
        raise _no_weights(folder)
    index = read_json(folder / INDEX, limit=MAX_INDEX, unique=True).get("weight_map")
    if not isinstance(index, dict):
        raise InputError(f"{shown(folder / INDEX)} has no weight_map object")
    for tensor, shard in index.items():
        if not _is_file_name(shard):
            raise InputError(
                f"{shown(folder / INDEX)}: the shard of {shown(tensor)} is {shown(shard)}, "
                "which is not the name of a safetensors file in the same folder"
            )
    names = sorted(set(index.values()))
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        raise InputError(
            f"{shown(folder / INDEX)} names {_listed(missing)}, missing from the folder",
            "fetch the model again",
        )
    return names, index


def _is_file_name(value: object) -> bool:
    """Whether a value of weight_map names a safetensors file beside the index, judged by the name alone."""
    return isinstance(value, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", value) is not None and is_unicode(value)


def _check_index(index: dict[str, str], tensors: dict[str, TensorInfo], path: Path) -> None:
    unindexed = [name for name in tensors if name not in index]
    if unindexed:
        raise InputError(f"{shown(path)} and the headers disagree: it does not name {_listed(unindexed)}")
    misplaced = [name for name, shard in index.items() if name not in tensors or tensors[name].shard != shard]
    if misplaced:
        raise InputError(f"{shown(path)} and the headers disagree: not in the shard it names: {_listed(misplaced)}")


def _listed(names: Iterable[str]) -> str:
    """The first names and how many there are in all."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(shown, names[:LISTED])) + more


def _no_weights(folder: Path) -> InputError:
    with reading(folder):
        names = sorted(os.listdir(folder))
    pickles = [name for name in names if name.endswith((*_PICKLES, ".bin.index.json"))]
    if pickles:
        return InputError(
            f"{shown(folder)} has only {_listed(pickles)}: pickle is not loaded, it can run code", _CONVERT
        )
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    found = f"; it has {_listed(weights)}" if weights else ""
    return InputError(f"{shown(folder)} has no weights: expected {SINGLE} or {INDEX}{found}")


def _other_files(folder: Path) -> tuple[str, ...]:
    """Every regular file to carry over: not config, weights, their indexes, our own records, nothing hidden."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"cannot read {shown(error.filename)}: {error.strerror}") from error

    found = []
    for where, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(where, file)
            name = path.relative_to(folder).as_posix()
            is_weight = file.endswith((*_WEIGHTS, ".index.json"))
            if not file.startswith(".") and not is_weight and name != CONFIG and name not in _OURS and path.is_file():
                found.append(name)
    return tuple(sorted(found))
