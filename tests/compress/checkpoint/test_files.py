"""Files that are written in one step, and durably."""

import errno
import itertools
import os
import stat
from pathlib import Path

import pytest
from publishing import killed_at, names

from llmpare.compress.checkpoint.files import read_at
from llmpare.compress.checkpoint.publish import copy_file, write_file
from llmpare.compress.errors import InputError, LlmpareError, OutputError


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


def test_the_system_may_hand_over_less_than_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does beyond 2 GiB at a time, and on some network file systems at any size."""
    data = os.urandom(100)
    path = tmp_path / "file"
    path.write_bytes(data)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    fd = os.open(path, os.O_RDONLY)
    assert read_at(fd, 10, 80, path) == data[10:90]
    with pytest.raises(InputError, match="expected at least 101 bytes, it has 100"):
        read_at(fd, 10, 91, path)
    os.close(fd)


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
