import errno
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llmpare.compress import batches, estimate
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import OutputError
from llmpare.compress.model.layout import layout
from llmpare.compress.needs import Needs
from llmpare.compress.request import QuantizeRequest, Scheme, TextSpec

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
GIB = 2**30
SEQLEN = 512


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    source = Checkpoint.open(TINY_LLAMA)
    yield source
    source.close()


def needs(checkpoint: Checkpoint, *, dtype: str = "BF16", nsamples: int | None = 64, **request: object) -> Needs:
    found = layout(checkpoint)
    texts = {"calibration": TextSpec(nsamples=nsamples), "evaluation": TextSpec(nsamples=8)}
    asked = QuantizeRequest(str(TINY_LLAMA), Path("out"), **{**texts, **request})  # type: ignore[arg-type]
    return estimate.needs(checkpoint, found, dict.fromkeys(found.linears, Scheme()), asked, dtype=dtype, seqlen=SEQLEN)


def large(*, stream: int = 8192, waiting: int = 45056, tokens: int = 128 * 2048, **more: object) -> Needs:
    """Made up, but of the size of a model of eight billion parameters."""
    parts: dict[str, object] = {
        "process": GIB // 2,
        "outside": 2 * GIB,
        "head": GIB,
        "entering": GIB,
        "block": GIB,
        "following": GIB // 2,
        "statistics": GIB,
        "solving": 3 * GIB,
        "forward_per_token": 2**18,
        "stream_per_token": stream,
        "waiting_per_token": waiting,
        "watched": GIB,
        "logits_per_position": 20 * 2**17,
        "tokens": tokens,
        "at_once": 4096,
    }
    return Needs(**{**parts, **more})  # type: ignore[arg-type]


def test_tokens_are_windows_times_their_length(checkpoint: Checkpoint) -> None:
    assert needs(checkpoint, nsamples=64).tokens == 64 * SEQLEN
    assert needs(checkpoint, nsamples=None).tokens == 128 * SEQLEN


def test_every_part_is_counted(checkpoint: Checkpoint) -> None:
    for name, size in asdict(needs(checkpoint)).items():
        assert name in ("way", "device") or size > 0, name


@pytest.mark.parametrize("part", ["process", "outside", "block", "following", "watched", "statistics", "solving"])
def test_more_of_anything_takes_more_memory(part: str) -> None:
    small = large()
    assert replace(small, **{part: getattr(small, part) + GIB}).memory == small.memory + GIB


def test_solving_and_running_a_block_are_not_done_at_once() -> None:
    """Of the two, the larger counts."""
    small = large(waiting=0)
    assert replace(small, forward_per_token=0).memory == small.memory
    assert replace(small, forward_per_token=2**20, solving=0).memory == small.memory + GIB


def test_entering_and_leaving_count_if_they_take_most() -> None:
    assert large(head=30 * GIB, outside=30 * GIB).within(1).memory > 30 * GIB
    assert large(logits_per_position=2**27).memory > 60 * GIB
    assert large(logits_per_position=2**27).within(1).memory < 30 * GIB  # a few at a time


def test_what_costs_least_time_is_given_up_first() -> None:
    asked, given = large(), []
    for room in (40 * GIB, 21 * GIB, 39 * GIB // 2, 17 * GIB, 8 * GIB):
        fitted = asked.within(room)
        assert fitted.memory <= room
        assert fitted.sequential
        given.append(len(fitted.way.lines()))
    assert given == [0, 1, 2, 3, 4]
    assert asked.within(1).memory == asked.least
    assert fitted.spilled == GIB + 8192 * asked.tokens


def test_more_windows_do_not_take_more_memory_at_the_least() -> None:
    assert large(tokens=10**6).least == large(tokens=10**8).least


def test_what_has_to_stay_is_not_given_up() -> None:
    fitted = large(frugal=False).within(1)
    assert fitted.way.outside
    assert fitted.way.ahead
    assert fitted.way.kept
    assert not fitted.way.together


def test_freed_memory_is_kept_where_little_of_it_lies_idle(checkpoint: Checkpoint) -> None:
    """It is quicker, takes more, and is the first thing to be given up."""
    small = needs(checkpoint)
    assert small.way.ready
    enough = small.memory
    lean = small.within(enough - 1)
    assert not lean.way.ready
    assert lean.way == replace(small.way, ready=False)
    assert 0 < enough - lean.memory < 2**29
    assert not large().within(64 * GIB).way.ready


def test_what_passes_at_once_is_what_a_batch_holds(checkpoint: Checkpoint) -> None:
    """No more than there is, nor than the device gets at once."""
    per_token = 2**20
    small = large(waiting=0, forward_per_token=per_token)
    assert replace(small, at_once=2 * small.at_once).memory == small.memory + per_token * small.at_once
    assert needs(checkpoint, nsamples=64).at_once == batches.batch_tokens("cpu")
    few = needs(checkpoint, nsamples=2, evaluation=TextSpec(nsamples=3))
    assert few.at_once == 3 * SEQLEN


def test_the_estimate_holds_what_is_surely_there(checkpoint: Checkpoint) -> None:
    """All weights outside the blocks, one block in its own precision, and two streams of hidden states per text."""
    found = needs(checkpoint)
    outside = sum(checkpoint.tensors[name].nbytes for name in layout(checkpoint).outside)
    assert found.outside >= outside
    assert found.memory > estimate.process() + outside
    assert found.stream_per_token == checkpoint.config["hidden_size"] * 2
    assert needs(checkpoint, dtype="F32").stream_per_token == checkpoint.config["hidden_size"] * 4
    assert found.statistics == 4 * checkpoint.config["intermediate_size"] ** 2


def test_linears_that_stay_as_they_are_do_not_count(checkpoint: Checkpoint) -> None:
    found = layout(checkpoint)
    schemes = {linear: None if "mlp" in linear.name else Scheme() for linear in found.linears}
    asked = QuantizeRequest(str(TINY_LLAMA), Path("out"))
    small = estimate.needs(checkpoint, found, schemes, asked, dtype="BF16", seqlen=SEQLEN)
    assert small.statistics == 4 * checkpoint.config["hidden_size"] ** 2
    assert small.solving < needs(checkpoint).solving


@pytest.mark.parametrize("request_", [{"method": "tuned"}, {"options": (("correction", 0.5),)}], ids=["tuned", "drift"])
def test_methods_that_look_at_the_original_stream_pay_for_it(checkpoint: Checkpoint, request_: dict) -> None:
    plain, both = needs(checkpoint), needs(checkpoint, **request_)
    assert both.stream_per_token == 2 * plain.stream_per_token
    assert both.statistics > 2 * plain.statistics
    assert plain.sequential
    assert not both.sequential


def test_without_text_there_is_nothing_to_calibrate_on(checkpoint: Checkpoint) -> None:
    found = needs(checkpoint, method="rtn", calibration=TextSpec("none"))
    assert found.tokens == found.statistics == 0
    assert not found.sequential
    assert found.memory < needs(checkpoint).memory


def test_the_explanation_names_every_part_with_its_size() -> None:
    shown = large(waiting=0).explain()
    assert shown == "process 512 MiB, weights 3.5 GiB, solver 4.0 GiB, activations 4.0 GiB"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_of_a_device(device: str) -> None:
    assert batches.batch_tokens(device) >= batches.logit_tokens(device) > 0
    assert batches.batch_tokens("cuda") > batches.batch_tokens("cpu")
    assert batches.batch_tokens("other") == batches.batch_tokens("cpu")


def test_disk_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch) -> None:
    asked = []

    class Usage:
        free = 123

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage()

    monkeypatch.setattr(estimate.shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    assert estimate.disk_free(tmp_path / "a" / "b" / "c") == 123
    assert estimate.disk_free(Path("d")) == 123
    (tmp_path / "there").mkdir()
    assert estimate.disk_free(tmp_path / "there") == 123
    assert asked == [tmp_path, tmp_path, tmp_path / "there"]
    (tmp_path / "there.partial").mkdir()
    (tmp_path / "there.partial" / "weights").write_bytes(b"x" * 10_000)  # what a killed run has taken already
    assert 10_000 <= estimate.disk_free(tmp_path / "there") - 123 < 20_000


def test_a_place_that_may_not_be_entered_is_an_error_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(estimate.shutil, "disk_usage", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        estimate.disk_free(tmp_path / "out")
