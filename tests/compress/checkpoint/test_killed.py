"""Faults 29, 38 and 39: a run that is killed, at any durable operation, and run again."""

import itertools
from pathlib import Path

import pytest
from publishing import KILLED, SPEC, check_never_incomplete, contents, interrupt, killed_at, names, produce

from llmpare.compress.checkpoint.publish import finished, verify
from llmpare.compress.errors import InputError, OutputError


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
    with pytest.raises(OutputError, match="was made with other settings: "):
        produce(out, source, spec={"other": 1})
    assert names(out.parent) == ["out"]
    assert "lock" not in names(out)
    assert finished(out, SPEC)
