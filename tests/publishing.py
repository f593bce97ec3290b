"""A run that publishes two small blocks, with no model behind it, and ways to kill it."""

import itertools
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.publish import (
    Workspace,
    build_manifest,
    copy_file,
    finished,
    settle,
    verify,
    write_file,
)
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec

SPEC: dict[str, Any] = {"scheme": {"bits": 4}, "layers": ("a", "b")}
TENSORS = [TensorSpec(f"block.{i}.{name}", "U8", (8,)) for i in range(2) for name in ("codes", "scale")]
SOURCE = {"tokenizer.json": b"{}", "templates/chat [/x].jinja": b"x" * 100}

KILLED = 86
DURABLE = ("pwrite", "write", "posix_fallocate", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


def produce(
    out: Path, source: Path, *, spec: dict[str, Any] = SPEC, force: bool = False, restart: bool = False
) -> list[str]:
    """What a run does, with two blocks of two tensors. Returns what was damaged."""
    if finished(out, spec):
        settle(out)
        verify(out)
        return []
    with Workspace(out, force=force, restart=restart, spec=spec) as workspace:
        manifest = workspace.pending(spec)
        messages = [*workspace.messages]
        if manifest is None:
            with Journal(workspace.journal, spec) as journal:
                tensors = write_blocks(workspace.partial, journal, messages)
            for name in SOURCE:
                copy_file(source / name, workspace.partial / name)
            write_file(workspace.partial / "config.json", b"{}")
            write_file(workspace.partial / "report.json", str(time.time_ns()).encode())
            manifest = build_manifest(
                workspace.partial, spec=spec, source={"a": "00"}, versions={"llmpare": "1"}, tensors=tensors
            )
        workspace.publish(manifest)
    return messages


def write_blocks(folder: Path, journal: Journal, messages: list[str]) -> dict[str, str]:
    messages += journal.dropped
    with CheckpointWriter(folder, TENSORS, max_shard_bytes=16) as writer:
        for block in ("block.0", "block.1"):
            names = [spec.name for spec in TENSORS if spec.name.startswith(block)]
            if block in journal.done:
                if journal.done[block] == {name: sha256(writer.read(name)).hexdigest() for name in names}:
                    continue
                messages.append(f"{block} failed its checksum, redoing")
                journal.forget(block)
            digests = {name: writer.write(name, content(name)) for name in names}
            writer.sync()
            journal.append(block, digests)
    return {name: digest for record in journal.done.values() for name, digest in record.items()}


def content(name: str) -> bytes:
    return sha256(name.encode()).digest()[:8]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds a clock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def put_source(folder: Path) -> Path:
    """Writes what a run carries over, below `folder`."""
    for name, data in SOURCE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def on_writes(name: str, arguments: tuple[Any, ...]) -> bool:
    return name != "open" or bool(arguments[1] & (os.O_WRONLY | os.O_RDWR))


def killed_at(n: int, action: Callable[[], object], *, only: str | None = None, torn: bool = False) -> int:
    """Runs `action` in a process that dies at its n-th durable operation. torn: after half of a write is done."""
    pid = os.fork()
    if pid != 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = itertools.count(n - 1, -1)

    def deadly(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if on_writes(name, arguments) and next(left) == 0:
                if torn and name == "pwrite":
                    fd, data, offset = arguments
                    real(fd, bytes(data)[: len(data) // 2], offset)
                os._exit(KILLED)
            return real(*arguments, **options)

        return call

    for name in [only] if only else ["open", *DURABLE]:
        setattr(os, name, deadly(name, getattr(os, name)))
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def check_never_incomplete(out: Path, old: dict[str, bytes] | None) -> None:
    """OUT is the old one, or the new one, or its old one waits for the rerun."""
    if out.exists():
        if contents(out) != old:
            verify(out)
    elif old is not None:
        assert contents(out.with_name("out.replaced")) == old


def interrupt(out: Path, source: Path, *, after: tuple[str, int], force: bool = False) -> None:
    """A run that is killed right before the n-th call of one function."""
    status = killed_at(after[1], lambda: produce(out, source, force=force), only=after[0])
    assert status == KILLED
