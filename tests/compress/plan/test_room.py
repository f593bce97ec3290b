"""Plans that are fitted into the memory and the disk there are."""

from pathlib import Path

import pytest
from plans import GIB, plan

from llmpare.compress import memory
from llmpare.compress.errors import MemoryLimitError, OutputError
from llmpare.compress.plan import within_room
from llmpare.compress.request import TextSpec


def test_enough_room(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out")
    assert within_room(planned, planned.needs.memory).needs.way.lines() == []
    limited = plan(llama, tmp_path / "out", max_memory=planned.needs.memory)
    assert within_room(limited, 64 * GIB).needs.memory == planned.needs.memory


def test_less_room_is_done_with_until_nothing_more_can_be_given_up(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out", calibration=TextSpec(nsamples=4096, seqlen=256))
    least = planned.needs.least
    assert least < planned.needs.memory / 2
    ways = []
    for room in (planned.needs.memory - 1, least):
        fitted = within_room(planned, room)
        assert fitted.needs.memory <= room
        assert fitted.specs == planned.specs
        assert fitted.sequential == planned.sequential
        ways.append(fitted.needs.way)
    assert not ways[-1].kept
    assert fitted.needs.spilled >= 4096 * 256 * 64 * 2
    with pytest.raises(MemoryLimitError, match="there is .* available") as caught:
        within_room(planned, least - 1)
    assert f"needs at least {memory.show(least)}" in str(caught.value)
    assert "larger machine" in caught.value.hint


def test_a_limit_is_a_limit(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out", max_memory=2**20)
    with pytest.raises(MemoryLimitError, match=r"there is --max-memory 1 MiB") as caught:
        within_room(planned, 64 * GIB)
    assert "--max-memory" in caught.value.hint


def test_disk_for_what_memory_has_no_room_for(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(llama, tmp_path / "out", calibration=TextSpec(nsamples=4096, seqlen=256))
    monkeypatch.setattr("llmpare.compress.plan.disk_free", lambda out: planned.file_bytes + 2**20)
    within_room(planned, planned.needs.memory)
    with pytest.raises(OutputError, match="hidden states .* need .* of disk"):
        within_room(planned, planned.needs.least)


def test_too_little_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(llama, tmp_path / "deep" / "out")
    asked: list[Path] = []

    def free(out: Path) -> int:
        asked.append(out)
        return planned.file_bytes - 1

    monkeypatch.setattr("llmpare.compress.plan.disk_free", free)
    with pytest.raises(OutputError, match="the output needs .* of disk") as caught:
        within_room(planned, 64 * GIB)
    assert str(tmp_path / "deep" / "out") in str(caught.value)
    assert "-o" in caught.value.hint
    assert asked == [tmp_path / "deep" / "out"]
