"""Fault 33: a disk that fails at any operation, once or for good."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from publishing import DURABLE, check_never_incomplete, contents, names, on_writes, produce

from llmpare.compress.checkpoint.publish import verify
from llmpare.compress.errors import OutputError


@pytest.mark.usefixtures("quick_sync")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("for_good", [False, True])
def test_every_write_fails_in_turn(
    tmp_path: Path,
    source: Path,
    expected: dict[str, bytes],
    code: int,
    force: bool,
    for_good: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fails once, or from then on; afterwards it is in order again and so is the result."""
    old = {"precious": b"old"} if force else None
    for n in itertools.count(1):
        out = tmp_path / str(n) / "out"
        out.parent.mkdir()
        if old is not None:
            out.mkdir()
            (out / "precious").write_bytes(b"old")
        with monkeypatch.context() as patch:
            failures = fail_at(patch, n, code, for_good)
            message = failure(lambda out=out: produce(out, source, force=force))  # type: ignore[misc]
        if not failures:
            break
        if message is None:
            assert failures[0] == "mkdir", "only a folder that exists need not be made"
        else:
            assert str(out.parent) in message
            assert os.strerror(code) in message
        assert all(name in ("out", "out.partial", "out.replaced") for name in names(out.parent))
        check_never_incomplete(out, old)
        partial = out.with_name("out.partial")
        if not for_good and partial.exists():
            assert {"journal.jsonl", "manifest.json"} & {*names(partial)}, "neither resumable nor gone"
        produce(out, source, force=force)
        assert contents(out) == expected
        assert names(out.parent) == ["out"]
    assert n > 60


def failure(action: Callable[[], object]) -> str | None:
    """The message of the OutputError, if there is one."""
    try:
        action()
    except OutputError as error:
        return error.message
    return None


def fail_at(patch: pytest.MonkeyPatch, n: int, code: int, for_good: bool) -> list[str]:
    """Makes the n-th durable operation fail, and all that follow or just that one. Returns a list of what failed."""
    left = itertools.count(n - 1, -1)
    failed: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if on_writes(name, arguments) and ((turn := next(left)) == 0 or (for_good and turn < 0)):
                failed.append(name)
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return call

    for name in ("open", *DURABLE):
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return failed


def test_a_failed_replacement_is_undone_at_once(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir(parents=True)
    (out / "precious").write_text("old")
    real = os.rename

    def rename(old: Path, new: Path) -> None:
        if Path(old).name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error"):
        produce(out, source, force=True)
    assert contents(out) == {"precious": b"old"}
    assert names(out.parent) == ["out", "out.partial"]


def test_a_failure_after_the_rename_leaves_the_next_run_alone(
    out: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as OUT is visible, OUT.partial may be another run's."""
    partial, real = out.with_name("out.partial"), os.fsync

    def fsync(fd: int) -> None:
        if out.exists():
            partial.mkdir()
            (partial / "lock").write_text("llmpare pid 1\n")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="Input/output error"):
            produce(out, source)
    assert names(partial) == ["lock"]
    assert verify(out)
