"""What a run has finished, through kills, damage and changed minds."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from llmpare.compress.checkpoint import journal
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.errors import InputError, OutputError

SPEC: dict[str, Any] = {"scheme": {"bits": 4, "group_size": 128}, "method": "gptq", "layers": ("a", "b")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def finish(path: Path, *units: str) -> None:
    with Journal(path, SPEC) as journal:
        for unit in units:
            journal.append(unit, {"sha256": {unit: unit * 2}, "error": 0.1, "shape": (1, 2)})


def test_what_was_appended_is_there_again(path: Path) -> None:
    with Journal(path, SPEC) as journal:
        assert (journal.done, journal.dropped) == ({}, [])
        journal.append("block 1", {"kl": 0.1 + 0.2, "shape": (1, 2)})
        journal.append("block 0", {})
        live = dict(journal.done)
    with Journal(path, SPEC) as journal:
        assert journal.done == live == {"block 1": {"kl": 0.1 + 0.2, "shape": [1, 2]}, "block 0": {}}
        assert list(journal.done) == ["block 1", "block 0"]
        assert journal.dropped == []
        journal.append("block 2", {})
    with Journal(path, SPEC) as journal:
        assert list(journal.done) == ["block 1", "block 0", "block 2"]


def test_the_last_word_counts(path: Path) -> None:
    with Journal(path, SPEC) as journal:
        journal.append("a", {"try": 1})
        journal.append("b", {})
        journal.forget("a")
        assert journal.done == {"b": {}}
        with pytest.raises(KeyError):
            journal.forget("c")
    with Journal(path, SPEC) as journal:
        assert journal.done == {"b": {}}
        journal.append("a", {"try": 2})
        journal.append("b", {"again": True})
    with Journal(path, SPEC) as journal:
        assert journal.done == {"a": {"try": 2}, "b": {"again": True}}


def test_hostile_names_come_back_unchanged(path: Path) -> None:
    names = ["a\nb", "\x1b[2J", "[/x]", "\u2028", "\ud800", "\r"]
    finish(path, *names)
    with Journal(path, SPEC) as journal:
        assert list(journal.done) == names
        assert journal.dropped == []


# --- fault 38: another spec


def test_another_spec_is_refused(path: Path) -> None:
    finish(path, "a")
    before = path.read_bytes()
    other = {"scheme": {"bits": 3, "group_size": 128}, "method": "rtn", "layers": ["a", "b"], "source": {"a": "00"}}
    with pytest.raises(InputError) as caught:
        Journal(path, other)
    message = caught.value.message
    assert "scheme.bits: 4, now 3" in message
    assert 'method: "gptq", now "rtn"' in message
    assert 'source: null, now {"a": "00"}' in message
    assert "group_size" not in message
    assert "layers" not in message
    assert str(path.parent) in message
    assert "--restart" in caught.value.hint
    assert path.read_bytes() == before


def test_a_journal_of_another_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(path, "a")
    monkeypatch.setattr(journal, "VERSION", 2)
    with pytest.raises(InputError, match="journal: 1, now 2"):
        Journal(path, SPEC)


def test_a_link_is_not_followed(path: Path) -> None:
    """Whoever can write beside OUT must not have us write somewhere else."""
    elsewhere = path.with_name("elsewhere")
    finish(elsewhere, "a")
    before = elsewhere.read_bytes()
    path.symlink_to(elsewhere.name)
    with pytest.raises(OutputError, match="symbolic link"):
        Journal(path, SPEC)
    assert elsewhere.read_bytes() == before


def test_many_differences_are_counted(path: Path) -> None:
    Journal(path, {f"tensor {i}": "0" for i in range(50)}).close()
    with pytest.raises(InputError, match="and 42 more") as caught:
        Journal(path, {f"tensor {i}": "1" for i in range(50)})
    assert caught.value.message.count(", now ") == 8


# --- fault 39: damage


def test_a_torn_last_line_is_dropped(path: Path) -> None:
    """Cut at every byte: whole lines count, the rest is dropped and does not get in the way of what follows."""
    finish(path, "a", "b")
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(ends[0], len(data) + 1):
        path.write_bytes(data[:cut])
        with Journal(path, SPEC) as journal:
            assert list(journal.done) == ["a", "b"][: sum(end <= cut for end in ends) - 1]
            assert len(journal.dropped) == (cut not in ends)
            journal.append("c", {})
        with Journal(path, SPEC) as journal:
            assert "c" in journal.done
            assert journal.dropped == []


def test_a_flipped_bit_costs_its_own_line(path: Path) -> None:
    finish(path, "a", "b", "c")
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for at in range(len(lines[0]) + len(lines[1]), len(data) - len(lines[3]) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1 << random.Random(at).randrange(8)
        path.write_bytes(damaged)
        with Journal(path, SPEC) as journal:
            assert list(journal.done) == ["a", "c"]
            assert all("failed its checksum" in message for message in journal.dropped)
            assert "journal.jsonl':3: " in journal.dropped[0]
    assert at > len(lines[0]) + len(lines[1])


@pytest.mark.parametrize("damage", [b"", b"\n", b"null\n", b"{}\n", b'{"sha256": 1}\n', b"\xff\xfe\n", b"x" * 10_000])
def test_an_unreadable_beginning_means_starting_over(path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    with Journal(path, SPEC) as journal:
        assert journal.done == {}
        assert "starting over" in journal.dropped[0]
        journal.append("a", {})
    with Journal(path, SPEC) as journal:
        assert list(journal.done) == ["a"]


# --- fault 33: a disk that fails


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_failed_append_can_be_repeated(path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path, SPEC) as journal:
        journal.append("a", {})

        def failing(fd: int, data: bytes = b"", offset: int = 0) -> int:
            if data:
                written(fd, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        written = os.pwrite
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(OutputError, match=r"journal.jsonl': No space left on device") as caught:
                journal.append("b", {"long": "x" * 1000})
        assert "free some space" in caught.value.hint
        assert list(journal.done) == ["a"]
        journal.append("c", {})
        journal.append("d", {})
    with Journal(path, SPEC) as journal:
        assert list(journal.done) == ["a", "c", "d"]


def test_append_is_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real = os.fsync

    def recording(fd: int) -> None:
        real(fd)
        synced.append(path.read_bytes())

    with Journal(path, SPEC) as journal:
        monkeypatch.setattr(os, "fsync", recording)
        journal.append("a", {})
        journal.forget("a")
    assert synced[-1] == path.read_bytes()
    assert len(synced) == 2
    assert synced[0].count(b"\n") == 2


def test_mode_obeys_the_umask(path: Path) -> None:
    before = os.umask(0o027)
    try:
        Journal(path, SPEC).close()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
