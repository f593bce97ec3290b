"""Rows 24 to 28: numbers that go wrong, and memory that ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faults.kit import DOWN_1, Llmpare, none, refused, report, resumable

from llmpare.compress import activations
from llmpare.compress.model.replay import Replay

LOUD = 1e19  # its square is beyond float32
OVERFLOWING = {
    "model.layers.1.post_attention_layernorm.weight": lambda gain: gain * LOUD,
    "model.layers.1.mlp.gate_proj.weight": lambda weight: weight / LOUD,
    "model.layers.1.mlp.up_proj.weight": lambda weight: weight / LOUD,
}


@pytest.mark.parametrize(
    ("changes", "options", "layers", "cause", "action"),
    [
        (
            {},
            ("--damping", "0", "--nsamples", "1"),
            14,
            "Gram matrix not positive definite at damping 0",
            "damping raised to 0.001",
        ),
        (
            OVERFLOWING,
            ("--asym",),
            2,
            "Gram matrix not positive definite, damping tried up to 1",
            "weighted round-to-nearest",
        ),
    ],
    ids=["fewer tokens than columns", "squares overflow"],
)
def test_24_gram_matrix(
    llmpare: Llmpare,
    tmp_path: Path,
    out: Path,
    text: tiny.Text,
    changes: dict[str, tiny.Change],
    options: tuple[str, ...],
    layers: int,
    cause: str,
    action: str,
) -> None:
    model = tiny.llama(tmp_path / "model", changes=changes)
    ended = llmpare(tiny.quantize(model, out, text, *options))
    assert ended.code == 0
    assert f"gate_proj: {action}" in ended.err
    found = report(out)
    assert len(found["fallbacks"]) == layers
    expected = {"name": "model.layers.1.mlp.gate_proj", "cause": cause, "action": action}
    assert expected in found["fallbacks"]
    assert found["fidelity"]["kl"]["mean"] < 0.2, "the fallback is no quantization worth the name"
    strict = llmpare(tiny.quantize(model, out.with_name("strict"), text, *options, "--strict"))
    assert strict.code == 4
    assert f"{layers} fallbacks" in strict.err
    assert tiny.contents(out.with_name("strict")) == tiny.contents(out)


@pytest.mark.parametrize("method", ["alps", "sparsegpt"])
def test_24_nothing_is_refitted_where_the_method_could_not(
    llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, method: str
) -> None:
    model = tiny.llama(tmp_path / "model", changes=OVERFLOWING)
    ended = llmpare(tiny.prune(model, out, text, "--sparsity", "0.5", "--method", method))
    assert ended.code == 0, ended.err
    assert "nothing refitted" in ended.err
    assert report(out)["fidelity"]["kl"]["mean"] < 1


def test_25_nonfinite_activations(llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    model = tiny.llama(tmp_path / "model", changes={DOWN_1: lambda weight: weight * 1e6})
    command = tiny.quantize(model, out, text, "--dtype", "float16")
    refused(llmpare, command, 3, "block 1 gives activations", "NaN or infinite", "--dtype bfloat16", "float32")
    assert resumable(out)
    again = llmpare(command)
    assert (again.code, "block 1 of 2" in again.err) == (3, True)
    assert llmpare(tiny.quantize(model, out, text, "--dtype", "float32", "--restart")).code == 0


def test_27_max_memory(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    refused(
        llmpare,
        tiny.quantize(model, out, text, "--max-memory", "1MiB"),
        6,
        "the run needs at least",
        "MiB of memory, there is --max-memory 1 MiB",
    )
    assert none(out)


def test_27_the_least_is_enough_and_gives_the_same_bytes(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text
) -> None:
    """Head and blocks come and go, hidden states wait in a file, batches pass through blocks one at a time."""
    command = tiny.quantize(model, out, text, "--nsamples", "39")
    least = json.loads(llmpare([*command, "--dry-run", "--json"]).out)["least_memory_bytes"]
    ended = llmpare([*command, "--max-memory", str(least - 1)])
    assert (ended.code, none(out)) == (6, True)
    assert llmpare([*command, "--max-memory", str(least)]).code == 0
    frugal = tiny.contents(out)
    assert llmpare([*command, "--force"]).code == 0
    assert tiny.contents(out) == frugal


@pytest.fixture
def device_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """device_memory(block, room): block number `block` runs out of memory with more than `room` windows at a time.

    Returns a list that gets the number of windows of every call that worked.
    """

    def limit(block: int, room: int) -> list[int]:
        real, worked = Replay.run, []

        def replay(self: Replay, index: int, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
            if index == block and len(hidden) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB")
            worked.append(len(hidden))
            return real(self, index, hidden, *more)

        monkeypatch.setattr(Replay, "run", replay)
        return worked

    return limit


@pytest.mark.parametrize("method", ["gptq", "tuned"])
def test_28_device_memory_once(
    llmpare: Llmpare,
    model: Path,
    out: Path,
    text: tiny.Text,
    device_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Half the batch fits: the run goes on from the last finished block, and is as good as any other."""
    monkeypatch.setattr(activations, "batch_tokens", lambda device: 4 * tiny.WINDOW)
    options = "--method", method, "--nsamples", "8", *(("--steps", "3") if method == "tuned" else ())
    assert llmpare(tiny.quantize(model, out.with_name("plenty"), text, *options)).code == 0
    worked = device_memory(1, 2)
    ended = llmpare(tiny.quantize(model, out, text, *options))
    assert ended.code == 0
    assert "ran out of memory with 4 windows at a time, trying 2" in ended.err
    assert {4, 2} <= {*worked}
    assert [block["resumed"] for block in report(out)["blocks"]] == [True, False]
    assert tiny.names(out.parent) == ["plenty", "w4"]
    assert llmpare(["verify", str(out)]).code == 0
    found, expected = report(out)["fidelity"], report(out.with_name("plenty"))["fidelity"]
    assert found["perplexity"]["dense"] == pytest.approx(expected["perplexity"]["dense"], rel=1e-5)
    assert found["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=0.1)


def test_28_device_memory_twice(
    llmpare: Llmpare,
    model: Path,
    out: Path,
    text: tiny.Text,
    undisturbed: dict[str, bytes],
    device_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tiny.quantize(model, out, text)
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "run", Replay.run)  # what the context puts back
        device_memory(1, 0)
        refused(llmpare, command, 6, "ran out of memory in block 1", "3.14 GiB", "--device cpu")
        assert resumable(out)
    monkeypatch.undo()
    again = llmpare(command)
    assert (again.code, report(out)["blocks"][0]["resumed"]) == (0, True)
    assert tiny.contents(out) == undisturbed
