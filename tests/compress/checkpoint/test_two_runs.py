"""Fault 37: of two runs with one output, the second is turned away."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from publishing import SPEC, contents, names, produce

from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.publish import Workspace, finished, settle
from llmpare.compress.errors import BusyError, OutputError


@pytest.fixture
def other_run(out: Path) -> Iterator[int]:
    """A process that holds the workspace until it is killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Workspace(out, force=False, restart=False) as workspace:
            Journal(workspace.journal, SPEC)
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(0)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    os.close(writing)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_second_run_is_turned_away(out: Path, source: Path, other_run: int) -> None:
    partial = out.with_name("out.partial")
    before = contents(partial)
    for restart in (False, True):
        start = time.monotonic()
        with pytest.raises(BusyError, match=f"another run .pid {other_run}. is working in .*out.partial"):
            produce(out, source, restart=restart)
        assert time.monotonic() - start < 5
    assert contents(partial) == before


def test_a_killed_run_leaves_no_lock(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    pid = os.fork()
    if pid == 0:
        with Workspace(out, force=False, restart=False) as workspace:
            Journal(workspace.journal, SPEC)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert names(out.parent) == ["out.partial"]
    produce(out, source)
    assert contents(out) == expected


def test_a_lock_that_went_away_meanwhile(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run ends, and removes the folder, between our opening of the lock and our taking it."""
    import fcntl

    real, calls = fcntl.flock, itertools.count()

    def flock(fd: int, how: int) -> None:
        if next(calls) == 0:
            (out.with_name("out.partial") / "lock").unlink()
            out.with_name("out.partial").rmdir()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    produce(out, source)
    assert next(calls) == 2
    assert finished(out, SPEC)


def test_many_runs_at_once(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    """Each of them either does it, or is turned away."""
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                produce(out, source)
                status = 0
            except BusyError:
                status = 7
            except OutputError:  # looked for a finished output a moment too early
                status = 5
            finally:
                os._exit(status)
        children.append(pid)
    statuses = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
    assert statuses <= {0, 5, 7}
    assert 0 in statuses
    assert contents(out) == expected
    assert names(out.parent) == ["out"]


def test_settle_waits_for_a_live_run(out: Path, source: Path) -> None:
    import fcntl

    produce(out, source)
    settle(out)
    (out / "lock").write_text("llmpare pid 123\n")
    with (out / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="pid 123"):
            settle(out)
    settle(out)
    assert "lock" not in names(out)
