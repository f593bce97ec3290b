"""Whole measurements, by worker processes as users get them."""

import json
from pathlib import Path
from typing import Any

import fake_engines
import families
import pytest
import tiny
import torch

from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.speed import machine, supervise
from llmpare.compress.evaluate.speed import measure as measuring
from llmpare.compress.evaluate.speed.measure import measure
from llmpare.compress.progress import Silent

LIMIT = 64 * 2**20  # bytes: more than the model, less than any process that has torch
ROOF = {"bandwidth_gb_s": 10.0, "gflops": 50.0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds and is tested elsewhere."""
    monkeypatch.setattr(machine, "measure", lambda device, dtype: ROOF)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for busy cores are slower than one


def timed(model: Path, **settings: Any) -> dict[str, Any]:
    fixed = {"device": torch.device("cpu"), "dtype": torch.float32, "progress": Silent()}
    return measure(model, **{"new_tokens": 3, "repeats": 2, **fixed, **settings})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything at once: without a compiler, on a model of 128 positions, with no memory for larger batches."""
    place = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "measure", lambda device, dtype: ROOF)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CXX", str(place / "nowhere"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place / "cache"))
        variations = ["off", "compiled", "eager", "flash_attention_2"]
        model = tiny.llama(place / "model")
        return timed(model, prompts=[8, 16, 128], variations=variations, max_memory=LIMIT)


def test_rows_are_complete_and_count_their_tokens(found: dict[str, Any]) -> None:
    cases = [(row["mode"], row["batch"], row["prompt"], row["cache"], row["attention"]) for row in found["rows"]]
    kinds = [(8, "dynamic", "sdpa"), (16, "dynamic", "sdpa"), (8, "off", "sdpa"), (8, "dynamic", "eager")]
    assert cases == [(mode, 1, *kind) for kind in kinds for mode in ("prefill", "decode")]
    for row in found["rows"]:
        assert (row["engine"], row["weights"], row["memory"]) == ("transformers", "as stored", "resident")
        assert (row["new_tokens"], row["warmup"], row["repeats"], row["compiled"]) == (3, 1, 2, False)
        assert row["weight_bytes"] >= sum(tensor.nbytes for tensor in tiny.tensors().values())
        assert row["peak_bytes"] > 0
        assert row["spread"] >= 0
        assert row["ttft_ms"]["p90"] >= row["ttft_ms"]["median"] > 0
        assert all(share > 0 for share in row["roofline"].values())
        if row["mode"] == "prefill":
            assert row["tpot_ms"] is None
            # Two repetitions: the median is their mean, of rates as of times.
            assert row["tokens_per_second"] >= row["prompt"] / row["ttft_ms"]["median"] * 1000 * 0.999
        else:
            assert row["tpot_ms"]["p90"] >= row["tpot_ms"]["median"] > 0
    assert found["machine"] == ROOF
    json.dumps(found, allow_nan=False)


def test_what_was_not_measured_is_told_with_the_reason(found: dict[str, Any]) -> None:
    why = {entry["what"]: entry["why"] for entry in found["skipped"]}
    too_long = why["batch 1, prompt 128, dynamic cache, sdpa attention"]
    assert too_long == "128 + 3 tokens are more than the 128 the model allows"
    assert "C++ compiler" in why["batch 1, prompt 8, static cache, compiled, sdpa attention"]
    assert why["batch 1, prompt 8, dynamic cache, flash_attention_2 attention"] == "flash attention needs CUDA"
    assert len(why) == 4


def test_growing_ends_at_the_memory_that_is_allowed(found: dict[str, Any]) -> None:
    (ended,) = [entry for entry in found["skipped"] if "MiB allowed" in entry["why"]]
    assert ended["what"].startswith("batch 2,")
    assert f"of the {LIMIT >> 20} MiB allowed" in ended["why"]


def test_the_others_go_on_when_an_engine_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engines.install(tmp_path, "llama_cpp", fake_engines.LLAMA_CPP, monkeypatch)
    (tmp_path / "model.gguf").touch()
    found = timed(tmp_path, engines=["llama.cpp"], prompts=[8, 32, 16, 33, 24], batches=[1, 2])
    assert [row["prompt"] for row in found["rows"] if row["mode"] == "decode"] == [8, 16, 24]
    assert {row["weight_bytes"] for row in found["rows"]} == {1234}
    assert [(entry["what"].partition(",")[0], entry["why"]) for entry in found["skipped"]] == [
        ("batches", "it runs one sequence at a time here"),
        ("batch 1", "it was ended by SIGKILL"),
        ("batch 1", "RuntimeError: 33 is too many"),
    ]


def test_an_engine_that_cannot_load_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engines.install(tmp_path, "llama_cpp", fake_engines.LLAMA_CPP, monkeypatch)
    (tmp_path / "broken.gguf").touch()
    with pytest.raises(InputError, match="llama.cpp, loading: ValueError: cannot read the file"):
        timed(tmp_path, engines=["llama.cpp"], prompts=[8])


def test_a_model_without_scaled_dot_product_attention_runs_with_its_own(tmp_path: Path) -> None:
    found = timed(families.write(tmp_path, "bloom"), prompts=[8], batches=[1], variations=["off", "eager"])
    assert {(row["cache"], row["attention"]) for row in found["rows"]} == {("dynamic", "eager"), ("off", "eager")}
    (skipped,) = found["skipped"]
    assert skipped["what"] == "batch 1, prompt 8, dynamic cache, eager attention"
    assert "it is the model's own" in skipped["why"]


def test_a_model_that_is_more_than_memory_allows_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers, loading: MemoryLimitError: its weights take .* of the 1 MiB"):
        timed(tiny.llama(tmp_path / "model"), prompts=[8], max_memory=2**20)


def test_the_devices_memory_is_given_back_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process keeps for later, an engine in another process could not have."""
    order: list[str] = []
    monkeypatch.setattr(machine, "measure", lambda device, dtype: order.append("machine"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("given back"))
    monkeypatch.setattr(measuring, "supervise", lambda job: order.append("engine") or [])
    with pytest.raises(InputError, match="no speed could be measured"):
        timed(tiny.llama(tmp_path / "model"), device=torch.device("cuda"))
    assert order == ["machine", "given back", "engine"]


def test_an_engine_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engines.install(tmp_path, "llama_cpp", "import time\ntime.sleep(600)\n", monkeypatch)
    monkeypatch.setattr(supervise, "PATIENCE", 0.5)
    monkeypatch.setattr(supervise, "GLANCE", 0.1)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match="llama.cpp, loading: it said nothing for 0 s"):
        timed(tmp_path, engines=["llama.cpp"], prompts=[8])
