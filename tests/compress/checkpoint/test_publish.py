"""From OUT.partial to OUT: what is refused, what becomes visible when, and what is kept."""

import locale
import os
import stat
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from publishing import SPEC, TENSORS, content, contents, interrupt, names, produce

from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.publish import Workspace, build_manifest, finished, verify
from llmpare.compress.errors import InputError, OutputError


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
    with pytest.raises(OutputError, match='settings: layers: ."a", "b".,.now null; other: null, now 1; scheme'):
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


def test_something_that_appears_during_the_run_is_not_replaced(out: Path, source: Path) -> None:
    with Workspace(out, force=False, restart=False) as workspace:
        manifest = build_manifest(workspace.partial, spec=SPEC, source={}, versions={}, tensors={})
        out.mkdir()
        (out / "precious").write_text("new")
        with pytest.raises(OutputError, match="not empty"):
            workspace.publish(manifest)
    assert contents(out) == {"precious": b"new"}


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
