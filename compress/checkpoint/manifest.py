"""The manifest: what an output holds and where it comes from, and the proof that it still does."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.files import (
    files_below,
    opened,
    parse_json,
    read_file,
    reading,
    sha256_at,
    sha256_file,
    shown,
)
from llmpare.compress.checkpoint.header import read_header
from llmpare.compress.checkpoint.journal import canonical
from llmpare.compress.errors import InputError, OutputError

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
LOCK = "lock"
OWN = {MANIFEST, JOURNAL, LOCK}  # what a manifest does not list
VERSION = 1
MAX_MANIFEST = 1_000_000_000  # bytes
CHECKSUM = "manifest_sha256"


def build_manifest(
    folder: Path,
    *,
    spec: Mapping[str, Any],
    source: Mapping[str, Any],
    versions: Mapping[str, Any],
    tensors: Mapping[str, str],
    unhashed: Sequence[str] = ("report.json", "report.md"),
) -> dict[str, Any]:
    """What `folder` holds and where it comes from, without clock, host or user: the same run gives the same manifest.

    spec, source, versions: JSON values. tensors: name → sha256 of every tensor. unhashed: files that carry clocks and
    are listed by name only, as far as they exist. Raises InputError when a file cannot be read, OutputError when a
    tensor in it is not the one that was written.
    """
    found = _listing(folder)
    files = {name: _record(path, tensors) for name, path in found.items() if name not in unhashed}
    manifest = {
        "llmpare_manifest": VERSION,
        "files": files,
        "reports": [name for name in found if name in unhashed],
        "tensors": dict(tensors),
        "spec": dict(spec),
        "source": dict(source),
        "versions": dict(versions),
    }
    stored: dict[str, Any] = canonical(manifest)
    return stored


def _record(path: Path, tensors: Mapping[str, str]) -> dict[str, Any]:
    if path.suffix == ".safetensors" and (damaged := _damaged_tensor(path, tensors)) is not None:
        raise OutputError(
            f"{shown(path)}: what the disk holds of tensor {shown(damaged)} is not what was written",
            "check the disk, then run the same command again: it makes that part anew",
        )
    with reading(path):
        return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _damaged_tensor(path: Path, tensors: Mapping[str, str]) -> str | None:
    """The first tensor in a file whose sha256 is another one. Raises InputError for a header that is none."""
    with opened(path) as fd:
        for tensor in read_header(fd, path):
            known = tensors.get(tensor.name)  # not of what a teacher's predictions are kept in
            if known is not None and sha256_at(fd, tensor.start, tensor.nbytes, path) != known:
                return tensor.name
    return None


def finished(out: Path, spec: Mapping[str, Any]) -> bool:
    """Whether OUT has a sound manifest, made with this spec. The files are not looked at: see `verify`."""
    if not os.path.lexists(out / MANIFEST):
        return False
    try:
        return bool(read_manifest(out)["spec"] == canonical(dict(spec)))
    except InputError:
        return False


def verify(out: Path) -> dict[str, Any]:
    """Reads back every file of OUT and compares it with the manifest, which is returned.

    Raises InputError naming the file, and the tensor where there is one; also for missing and for unexpected files.
    """
    if not os.path.lexists(out / MANIFEST):
        raise InputError(f"{shown(out)} has no {MANIFEST}: it is not a finished output")
    manifest = read_manifest(out)
    files = manifest["files"]
    expected = {*files, *manifest["reports"]}
    found = _listing(out)
    for what, names in (
        ("is missing", expected - found.keys()),
        ("has no place in it", found.keys() - expected),
    ):
        if names:
            raise InputError(f"{shown(out)} is not what its manifest says: {shown(min(names))} {what}", _MAKE_AGAIN)
    for name, record in files.items():
        path = found[name]
        with reading(path):
            size = path.stat().st_size
        if size != record["bytes"]:
            raise InputError(f"{shown(path)} is damaged: expected {record['bytes']} bytes, it has {size}", _MAKE_AGAIN)
        if sha256_file(path) != record["sha256"]:
            where = _damaged_part(path, manifest["tensors"]) if name.endswith(".safetensors") else ""
            raise InputError(f"{shown(path)} is damaged{where}: its sha256 is not that of the manifest", _MAKE_AGAIN)
    return manifest


_MAKE_AGAIN = "fetch it again, or make it again with --force"


def _damaged_part(path: Path, tensors: Mapping[str, str]) -> str:
    """Which part of a damaged shard is not as it was written."""
    try:
        damaged = _damaged_tensor(path, tensors)
    except InputError:
        damaged = None
    if damaged is not None:
        return f" in tensor {shown(damaged)}"
    return " in its header" if tensors else ""


def _listing(folder: Path) -> dict[str, Path]:
    """Every file below a folder by POSIX name, sorted: not our own, nothing hidden, as hubs and desktops leave it."""
    paths = {path.relative_to(folder): path for path in files_below(folder)}
    seen = {path.as_posix(): where for path, where in paths.items() if not any(p.startswith(".") for p in path.parts)}
    return {name: seen[name] for name in sorted(seen.keys() - OWN)}


def _encoded(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def signed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is on disk, with a checksum of itself."""
    return _encoded({**manifest, CHECKSUM: hashlib.sha256(_encoded(manifest)).hexdigest()})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises InputError when a single byte of it is not as it was written."""
    path = folder / MANIFEST
    written = read_file(path, limit=MAX_MANIFEST)
    manifest = parse_json(written, path)
    manifest.pop(CHECKSUM, None)
    if manifest.get("llmpare_manifest") != VERSION:
        raise InputError(f"{shown(path)} is not a manifest of this version of llmpare", _MAKE_AGAIN)
    if written != signed(manifest):
        raise InputError(f"{shown(path)} is damaged: it failed its own checksum", _MAKE_AGAIN)
    return manifest
