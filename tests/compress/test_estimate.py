from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llmpare.compress import estimate
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.estimate import Needs
from llmpare.compress.model.layout import layout
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


def large(*, stream: int = 8192, waiting: int = 45056, tokens: int = 128 * 2048) -> Needs:
    """Made up, but of the size of a model of eight billion parameters."""
    return Needs(
        process=GIB // 2,
        weights=4 * GIB,
        statistics=GIB,
        solving=3 * GIB,
        forward=GIB,
        evaluation=GIB,
        stream_per_token=stream,
        waiting_per_token=waiting,
        tokens=tokens,
    )


def test_tokens_are_windows_times_their_length(checkpoint: Checkpoint) -> None:
    assert needs(checkpoint, nsamples=64).tokens == 64 * SEQLEN
    assert needs(checkpoint, nsamples=None).tokens == 128 * SEQLEN


def test_every_part_is_counted(checkpoint: Checkpoint) -> None:
    for name, size in asdict(needs(checkpoint)).items():
        assert size > 0 or name == "apart", name  # that is for mixtures of experts


@pytest.mark.parametrize("part", ["process", "weights", "evaluation", "tokens", "stream_per_token"])
def test_more_of_anything_takes_more_memory(part: str) -> None:
    small = large()
    assert replace(small, **{part: getattr(small, part) + GIB}).memory >= small.memory + GIB


def test_solving_and_running_a_block_are_not_done_at_once() -> None:
    """Of the two, the larger counts."""
    assert replace(large(), forward=0).memory == large().memory
    assert replace(large(), forward=10 * GIB).memory == large().memory + 6 * GIB
    assert replace(large(), forward=10 * GIB, solving=0).memory == large().memory + 6 * GIB


def test_the_estimate_holds_what_is_surely_there(checkpoint: Checkpoint) -> None:
    """All weights outside the blocks, one block in its own precision, and two streams of hidden states per text."""
    found = needs(checkpoint)
    outside = sum(checkpoint.tensors[name].nbytes for name in layout(checkpoint).outside)
    assert found.weights > outside
    assert found.memory > estimate.PROCESS + outside
    assert found.stream_per_token == checkpoint.config["hidden_size"] * 2
    assert needs(checkpoint, dtype="F32").stream_per_token == checkpoint.config["hidden_size"] * 4
    assert found.statistics > 4 * checkpoint.config["intermediate_size"] ** 2


@pytest.mark.parametrize("request_", [{"method": "tuned"}, {"options": (("correction", 0.5),)}], ids=["tuned", "drift"])
def test_methods_that_look_at_the_original_stream_pay_for_it(checkpoint: Checkpoint, request_: dict) -> None:
    plain, both = needs(checkpoint), needs(checkpoint, **request_)
    assert both.stream_per_token == 2 * plain.stream_per_token
    assert both.statistics == 2 * plain.statistics
    assert plain.sequential
    assert not both.sequential


def test_without_text_there_is_nothing_to_calibrate_on(checkpoint: Checkpoint) -> None:
    found = needs(checkpoint, method="rtn", calibration=TextSpec("none"))
    assert found.tokens == found.statistics == 0
    assert not found.sequential
    assert found.largest_sample(100 * GIB, SEQLEN) == 0
    assert found.memory < needs(checkpoint).memory


@pytest.mark.parametrize("waiting", [0, 45056, 200_000])
@pytest.mark.parametrize("tokens", [2048, 128 * 2048, 1024 * 2048])
def test_the_largest_sample_fits_and_one_more_does_not(tokens: int, waiting: int) -> None:
    """…where a smaller sample may also be treated otherwise than the one asked for."""
    asked = large(waiting=waiting, tokens=tokens)
    fitting = []
    for room in (8 * GIB, 9 * GIB, 10 * GIB, 15 * GIB, 20 * GIB, 26 * GIB, 40 * GIB):
        fit = asked.largest_sample(room, 2048)
        fitting.append(fit)
        assert fit == 0 or replace(asked, tokens=fit * 2048).memory <= room
        assert replace(asked, tokens=(fit + 1) * 2048).memory > room
    assert fitting[0] == 0
    assert fitting == sorted(fitting)
    assert fitting[-1] > 100


def test_windows_go_through_a_block_together_unless_that_is_too_much() -> None:
    limit = estimate.SEQUENTIAL // 45056
    assert large(tokens=limit).sequential
    assert not large(tokens=limit + 1).sequential
    assert large(tokens=limit).memory > large(tokens=limit + 1).memory


def test_the_explanation_names_every_part_with_its_size() -> None:
    shown = large(waiting=0).explain()
    assert shown == "process 512 MiB, weights 4.0 GiB, solver 4.0 GiB, activations 3.0 GiB"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_of_a_device(device: str) -> None:
    assert estimate.batch_tokens(device) >= estimate.logit_tokens(device) > 0
    assert estimate.batch_tokens("cuda") > estimate.batch_tokens("cpu")
    assert estimate.batch_tokens("other") == estimate.batch_tokens("cpu")


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
