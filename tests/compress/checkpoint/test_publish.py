"""From OUT.partial to OUT: what is refused, what a kill or a failing disk leaves, and what verify finds."""

import errno
import itertools
import json
import locale
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

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
from llmpare.compress.errors import BusyError, InputError, LlmpareError, OutputError

SPEC: dict[str, Any] = {"scheme": {"bits": 4}, "layers": ("a", "b")}
TENSORS = [TensorSpec(f"block.{i}.{name}", "U8", (8,)) for i in range(2) for name in ("codes", "scale")]
SOURCE = {"tokenizer.json": b"{}", "templates/chat [/x].jinja": b"x" * 100}


def produce(
    out: Path, source: Path, *, spec: dict[str, Any] = SPEC, force: bool = False, restart: bool = False
) -> list[str]:
    """What a run does, with two blocks of two tensors. Returns what was damaged."""
    if finished(out, spec):
        settle(out)
        verify(out)
        return []
    with Workspace(out, force=force, restart=restart) as workspace:
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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, data in SOURCE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


@pytest.fixture
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves the kernel's cache as it is: what really reaches the disk only costs time here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds a clock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("expected")
    for name, data in SOURCE.items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes(data)
    produce(folder / "out", folder / "source")
    return contents(folder / "out")


# --- an undisturbed run


def test_out_is_complete(out: Path, source: Path) -> None:
    produce(out, source)
    assert names(out.parent) == ["out"]
    assert names(out) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "report.json",
        "templates",
        "tokenizer.json",
    ]
    manifest = verify(out)
    assert manifest == {
        "llmpare_manifest": 1,
        "files": {
            name: {"bytes": len(data), "sha256": sha256(data).hexdigest()}
            for name, data in contents(out).items()
            if name != "manifest.json"
        },
        "reports": ["report.json"],
        "tensors": {spec.name: sha256(content(spec.name)).hexdigest() for spec in TENSORS},
        "spec": {"scheme": {"bits": 4}, "layers": ["a", "b"]},
        "source": {"a": "00"},
        "versions": {"llmpare": "1"},
    }
    assert finished(out, SPEC)
    assert not finished(out, {**SPEC, "seed": 1})
    assert not finished(out.parent, SPEC)


def test_the_same_command_again_changes_nothing(out: Path, source: Path) -> None:
    produce(out, source)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    produce(out, source)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")} == before


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_surroundings_do_not_matter(
    tmp_path: Path, source: Path, expected: dict[str, bytes], umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 43: time zone, locale, current folder and a relative name; only the mode follows the umask."""
    monkeypatch.setenv("TZ", "Pacific/Chatham")
    time.tzset()
    monkeypatch.chdir(tmp_path)
    before, language = os.umask(umask), locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C")
    try:
        produce(Path("out"), source)
    finally:
        os.umask(before)
        locale.setlocale(locale.LC_ALL, language)
        monkeypatch.undo()
        time.tzset()
    assert contents(tmp_path / "out") == expected
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


def test_the_current_folder_may_change_meanwhile(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Workspace(Path("out"), force=False, restart=False) as workspace:
        monkeypatch.chdir("/")
        workspace.publish(build_manifest(workspace.partial, spec=SPEC, source={}, versions={}, tensors={}))
    assert finished(tmp_path / "out", SPEC)


def test_everything_is_durable_before_it_is_visible(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(fd: int) -> None:
        real_sync(fd)
        events.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))

    def rename(old: Path, new: Path) -> None:
        real_rename(old, new)
        events.append(("rename", str(new)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    produce(out, source)
    visible = events.index(("rename", str(out)))
    synced = {name for kind, name in events[:visible] if kind == "sync"}
    partial = out.with_name("out.partial")
    assert {str(partial), str(partial / "templates"), str(partial / ".manifest.json.tmp")} <= synced
    assert {str(path) for path in partial.with_name("out").glob("*.safetensors")} == {
        name.replace("out.partial", "out") for name in synced if name.endswith(".safetensors")
    }
    assert events[visible + 1] == ("sync", str(out.parent))


# --- faults 34 and 36: OUT is something else


def test_occupied(out: Path, source: Path) -> None:
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "precious").write_text("precious")
    with pytest.raises(OutputError, match="exists and holds something else, 'deep' for example") as caught:
        produce(out, source)
    assert "--force" in caught.value.hint
    assert contents(out) == {"deep/precious": b"precious"}
    assert names(out.parent) == ["out"]

    produce(out, source, force=True)
    assert "deep" not in names(out)
    assert names(out.parent) == ["out"]


def test_a_finished_output_with_another_spec_is_occupied(out: Path, source: Path) -> None:
    produce(out, source)
    before = contents(out)
    with pytest.raises(OutputError, match="--force|holds something else"):
        produce(out, source, spec={"other": 1})
    assert contents(out) == before


def test_an_empty_folder_is_not_occupied(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    out.mkdir(parents=True)
    produce(out, source)
    assert contents(out) == expected


def test_a_folder_with_a_lock_of_its_own_is_left_alone(out: Path, source: Path) -> None:
    """Files called lock and manifest.json do not make it ours."""
    out.mkdir(parents=True)
    for name in ("lock", "manifest.json"):
        (out / name).write_text("precious")
    out.with_name("out.replaced").mkdir()
    with pytest.raises(OutputError, match="out.replaced' is in the way"):
        produce(out, source)
    out.with_name("out.replaced").rmdir()
    with pytest.raises(OutputError, match="holds something else"):
        produce(out, source)
    assert contents(out) == {"lock": b"precious", "manifest.json": b"precious"}


def make_link(path: Path) -> None:
    path.with_name("target").mkdir()
    path.symlink_to("target")


UNUSUAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (make_link, "is a symbolic link"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    "file": (lambda path: path.write_text("precious"), "is a file"),
    "pipe": (os.mkfifo, "is a pipe"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("suffix", ["", ".partial"])
@pytest.mark.parametrize("force", [False, True])
def test_unusual(out: Path, source: Path, kind: str, suffix: str, force: bool) -> None:
    make, message = UNUSUAL[kind]
    path = out.with_name("out" + suffix)
    path.parent.mkdir()
    make(path)
    before = path.lstat()
    with pytest.raises(OutputError, match=message) as caught:
        produce(out, source, force=force)
    assert str(path) in caught.value.message
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert set(names(out.parent)) <= {path.name, "target"}


def test_a_device(source: Path) -> None:
    with pytest.raises(OutputError, match="'/dev/null' is a device"):
        produce(Path("/dev/null"), source, force=True)


def test_a_mount_point(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(OutputError, match="is a mount point"):
        produce(out, source)
    assert names(out.parent) == ["out"]


def test_force_does_not_delete_the_current_folder(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "here").mkdir(parents=True)
    for folder in (out, out / "here"):
        monkeypatch.chdir(folder)
        with pytest.raises(OutputError, match="current folder"):
            produce(out, source, force=True)
    assert names(out) == ["here"]


def test_a_partial_folder_that_is_not_ours(out: Path, source: Path) -> None:
    partial = out.with_name("out.partial")
    for extra in ("", "lock"):
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "precious").write_text("precious")
        if extra:
            (partial / extra).write_text("mine")
        before = contents(partial)
        with pytest.raises(OutputError, match="out.partial' holds files that are not ours"):
            produce(out, source, restart=True)
        assert contents(partial) == before


def test_places_that_cannot_be_written(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Not a directory"):
        produce(tmp_path / "file" / "out", source)
    with pytest.raises(OutputError, match="File name too long"):
        produce(tmp_path / ("x" * 250), source)


@pytest.mark.parametrize("name", ["\x1b[2J", "[/x]", "a\nb", "\u202e", os.fsdecode(b"\xff")])
def test_hostile_names(tmp_path: Path, source: Path, expected: dict[str, bytes], name: str) -> None:
    out = tmp_path / name
    out.mkdir(parents=True)
    (out / "x").write_text("x")
    with pytest.raises(OutputError) as caught:
        produce(out, source)
    assert caught.value.message.isprintable()
    produce(out, source, force=True)
    assert contents(out) == expected


# --- fault 37: two runs


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


# --- what is kept on exit


def test_nothing_journalled_nothing_left(out: Path) -> None:
    with Workspace(out, force=False, restart=False) as workspace:
        (workspace.partial / "deep").mkdir()
        (workspace.partial / "deep" / "file").write_text("x")
    assert names(out.parent) == []
    with pytest.raises(KeyboardInterrupt), Workspace(out, force=False, restart=False):
        raise KeyboardInterrupt
    assert names(out.parent) == []


def test_a_journal_is_kept(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    with Workspace(out, force=False, restart=False) as workspace:
        Journal(workspace.journal, SPEC)
    assert names(out.with_name("out.partial")) == ["journal.jsonl", "lock"]
    assert produce(out, source) == []
    assert contents(out) == expected


def test_debris_without_a_journal_is_removed(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    """Whatever a killed run wrote before its journal, or while it wrote a file, must not reach OUT."""
    partial = out.with_name("out.partial")
    (partial / "sub").mkdir(parents=True)
    for name, data in (("lock", "llmpare pid 1\n"), ("old.json", ""), ("sub/x", "")):
        (partial / name).write_text(data)
    produce(out, source)
    assert contents(out) == expected


def test_temporary_files_are_removed(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    interrupt(out, source, after=("fsync", 12))
    partial = out.with_name("out.partial")
    (partial / "templates").mkdir(exist_ok=True)
    (partial / ".config.json.tmp").write_text("torn")
    (partial / "templates" / ".chat.tmp").write_text("torn")
    produce(out, source)
    assert contents(out) == expected


def test_restart_discards_what_there_is(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    with Workspace(out, force=False, restart=False) as workspace:
        Journal(workspace.journal, {"other": "spec"}).append("block.0", {})
        (workspace.partial / "extra").mkdir()
    with pytest.raises(InputError, match="was begun with other settings") as caught:
        produce(out, source)
    assert "--restart" in caught.value.hint
    assert names(out.with_name("out.partial")) == ["extra", "journal.jsonl", "lock"]
    produce(out, source, restart=True)
    assert contents(out) == expected


# --- faults 38 and 39: a run that was killed when all but the rename was done


def interrupt(out: Path, source: Path, *, after: tuple[str, int], force: bool = False) -> None:
    """A run that is killed right before the n-th call of one function."""
    status = killed_at(after[1], lambda: produce(out, source, force=force), only=after[0])
    assert status == KILLED


@pytest.fixture
def complete_partial(out: Path, source: Path) -> Path:
    interrupt(out, source, after=("rename", 1))
    partial = out.with_name("out.partial")
    assert "manifest.json" in names(partial)
    assert not out.exists()
    return partial


def test_a_complete_partial_is_just_published(out: Path, source: Path, complete_partial: Path) -> None:
    report = (complete_partial / "report.json").read_bytes()
    produce(out, source)
    assert (out / "report.json").read_bytes() == report, "the work was done again"
    assert names(out.parent) == ["out"]
    assert verify(out)["reports"] == ["report.json"]


def test_a_complete_partial_of_another_spec(out: Path, source: Path, complete_partial: Path) -> None:
    with pytest.raises(InputError, match="scheme.bits: 4, now 3") as caught:
        produce(out, source, spec={**SPEC, "scheme": {"bits": 3}})
    assert "--restart" in caught.value.hint
    assert "manifest.json" in names(complete_partial)
    produce(out, source, spec={**SPEC, "scheme": {"bits": 3}}, restart=True)
    assert finished(out, {**SPEC, "scheme": {"bits": 3}})


@pytest.mark.parametrize("name", ["manifest.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_damaged_complete_partial_is_redone(
    out: Path, source: Path, complete_partial: Path, name: str, expected: dict[str, bytes]
) -> None:
    data = (complete_partial / name).read_bytes()
    (complete_partial / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    (message,) = produce(out, source)
    assert name in message
    assert "redoing" in message
    assert contents(out) == expected


def test_a_damaged_block_is_redone(out: Path, source: Path, expected: dict[str, bytes]) -> None:
    interrupt(out, source, after=("replace", 4))
    partial = out.with_name("out.partial")
    path = partial / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert produce(out, source) == ["block.1 failed its checksum, redoing"]
    assert contents(out) == expected


# --- fault 29: a kill at every durable operation

KILLED = 86
DURABLE = ("pwrite", "write", "posix_fallocate", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


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


@pytest.mark.usefixtures("quick_sync")
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_killed_at_every_durable_operation(
    tmp_path: Path, source: Path, expected: dict[str, bytes], force: bool, torn: bool
) -> None:
    old = {"precious": b"old", "deep/precious": b"old"} if force else None
    for n in itertools.count(1):
        out = tmp_path / str(n) / "out"
        if old is not None:
            (out / "deep").mkdir(parents=True)
            for name, data in old.items():
                (out / name).write_bytes(data)
        status = killed_at(n, lambda out=out: produce(out, source, force=force), torn=torn)  # type: ignore[misc]
        assert status in (0, KILLED)
        check_never_incomplete(out, old)
        produce(out, source, force=force)
        assert contents(out) == expected, f"killed at operation {n}"
        assert names(out.parent) == ["out"]
        if status == 0:
            break
    assert n > 60


def check_never_incomplete(out: Path, old: dict[str, bytes] | None) -> None:
    """OUT is the old one, or the new one, or its old one waits for the rerun."""
    if out.exists():
        if contents(out) != old:
            verify(out)
    elif old is not None:
        assert contents(out.with_name("out.replaced")) == old


@pytest.mark.usefixtures("quick_sync")
@pytest.mark.parametrize("force", [False, True])
def test_killed_again_and_again(out: Path, source: Path, expected: dict[str, bytes], force: bool) -> None:
    """Each run works on the debris of all before it, and gets one operation further."""
    if force:
        out.mkdir(parents=True)
        (out / "old").write_text("old")
    for n in itertools.count(1):
        status = killed_at(n, lambda: produce(out, source, force=force), torn=n % 2 == 0)
        assert status in (0, KILLED)
        if status == 0:
            break
    produce(out, source, force=force)
    assert contents(out) == expected
    assert names(out.parent) == ["out"]


def test_a_kill_between_the_two_renames_is_undone_without_force(out: Path, source: Path) -> None:
    """Another command, without --force, must not find OUT gone and take its place."""
    out.mkdir(parents=True)
    (out / "precious").write_text("old")
    interrupt(out, source, after=("rename", 2), force=True)
    assert names(out.parent) == ["out.partial", "out.replaced"]
    with pytest.raises(OutputError, match="holds something else"):
        produce(out, source)
    assert contents(out) == {"precious": b"old"}
    assert names(out.parent) == ["out", "out.partial"]


def test_a_kill_after_the_rename_is_settled_by_another_spec(out: Path, source: Path) -> None:
    out.mkdir(parents=True)
    (out / "precious").write_text("old")
    interrupt(out, source, after=("rmdir", 1), force=True)
    assert names(out.parent) == ["out", "out.replaced"]
    assert verify(out)
    with pytest.raises(OutputError, match="holds something else"):
        produce(out, source, spec={"other": 1})
    assert names(out.parent) == ["out"]
    assert "lock" not in names(out)
    assert finished(out, SPEC)


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


# --- fault 33: a disk that fails


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


def test_something_that_appears_during_the_run_is_not_replaced(out: Path, source: Path) -> None:
    with Workspace(out, force=False, restart=False) as workspace:
        manifest = build_manifest(workspace.partial, spec=SPEC, source={}, versions={}, tensors={})
        out.mkdir()
        (out / "precious").write_text("new")
        with pytest.raises(OutputError, match="not empty"):
            workspace.publish(manifest)
    assert contents(out) == {"precious": b"new"}


# --- fault 41: verify


@pytest.fixture
def done(out: Path, source: Path) -> Path:
    produce(out, source)
    return out


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "templates/chat [/x].jinja", "tokenizer.json"])
def test_any_flipped_bit_is_found(done: Path, name: str) -> None:
    data = (done / name).read_bytes()
    for at in range(0, len(data), 1 + len(data) // 300):
        damaged = bytearray(data)
        damaged[at] ^= 1 << random.Random(at).randrange(8)
        (done / name).write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            verify(done)
        assert name in caught.value.message
        assert (done / name).read_bytes() == damaged
    (done / name).write_bytes(data)
    verify(done)


def test_a_flipped_bit_in_a_shard_names_the_tensor(done: Path) -> None:
    path = done / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    base = len(data) - 16
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << random.Random(at).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="model-00002-of-00002.safetensors' is damaged") as caught:
            verify(done)
        where = "'block.1.codes'" if base <= at < base + 8 else "'block.1.scale'"
        assert (f"in tensor {where}" if at >= base else " in ") in caught.value.message
    assert at > base


def test_missing_unexpected_and_cut_files(done: Path) -> None:
    (done / "extra").write_text("x")
    with pytest.raises(InputError, match="'extra' has no place in it"):
        verify(done)
    (done / "extra").unlink()
    data = (done / "tokenizer.json").read_bytes()
    (done / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="'tokenizer.json' is missing"):
        verify(done)
    (done / "tokenizer.json").write_bytes(data[:-1])
    with pytest.raises(InputError, match="tokenizer.json' is damaged: expected 2 bytes, it has 1"):
        verify(done)
    (done / "tokenizer.json").write_bytes(data)
    report = (done / "report.json").read_bytes()
    (done / "report.json").unlink()
    with pytest.raises(InputError, match="'report.json' is missing"):
        verify(done)
    (done / "report.json").write_bytes(report + b" ")
    verify(done)


def test_a_stale_lock_is_ignored(done: Path) -> None:
    (done / "lock").write_text("llmpare pid 1\n")
    verify(done)


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"llmpare_manifest": 2}', "{"])
def test_not_an_output(tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"manifest"):
        verify(tmp_path)
    assert not finished(tmp_path, SPEC)


def test_manifest_is_plain_json(done: Path) -> None:
    """Other tools may read it: files by name with their sha256."""
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["files"]["tokenizer.json"] == {"bytes": 2, "sha256": sha256(b"{}").hexdigest()}


# --- write_file and copy_file


def test_write_file_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    write_file(path, b"old")
    for n in itertools.count(1):
        status = killed_at(n, lambda: write_file(path, b"new"), torn=True)
        assert path.read_bytes() in (b"old", b"new")
        if status == 0:
            break
    assert n > 4
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_write_file_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        real(old, new)
        events.append("replace")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")))
    write_file(tmp_path / "file", b"x")
    assert events == [str(tmp_path / ".file.tmp"), "replace", str(tmp_path)]


def test_write_file_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in (".file.tmp", "link"):
        (tmp_path / name).symlink_to("precious")
    with pytest.raises(OutputError, match="file': Too many levels of symbolic links"):
        write_file(tmp_path / "file", b"x")
    write_file(tmp_path / "link", b"x")
    assert (tmp_path / "link").read_bytes() == b"x"
    assert (tmp_path / "precious").read_text() == "precious"


def test_copy_file(tmp_path: Path) -> None:
    data = os.urandom((1 << 21) + 17)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a").chmod(0o755)
    (tmp_path / "link").symlink_to("a")
    copy_file(tmp_path / "link", tmp_path / "sub" / "b")
    copied = tmp_path / "sub" / "b"
    assert copied.read_bytes() == data
    assert not copied.is_symlink()
    assert stat.S_IMODE(copied.stat().st_mode) & 0o111 == 0


def test_copy_file_says_whose_fault_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe' is not a regular file"):
        copy_file(tmp_path / "pipe", tmp_path / "b")
    with pytest.raises(InputError, match="missing': No such file"):
        copy_file(tmp_path / "missing", tmp_path / "b")

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call, kind in (("pread", InputError), ("pwrite", OutputError)):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(kind, match="Input/output error") as caught:
                copy_file(tmp_path / "a", tmp_path / "b")
        assert isinstance(caught.value, LlmpareError)
        assert f"{'a' if call == 'pread' else 'b'}'" in caught.value.message
    assert names(tmp_path) == ["a", "pipe"]
