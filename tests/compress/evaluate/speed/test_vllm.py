"""The adapter's own logic, on a module that stands in for vLLM and on a clock that it keeps."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_engines
import pytest
import tiny
import torch

from llmpare.compress.errors import UsageError
from llmpare.compress.evaluate.speed import prompts
from llmpare.compress.evaluate.speed.engine import Case, Job

ADAPTER = "llmpare.compress.evaluate.speed.engines.vllm"
CASE = Case(2, 8, 5, cache="paged", compiled=True, attention="its own")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake_engines.install(tmp_path, "vllm", fake_engines.VLLM, monkeypatch)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    found = import_module(ADAPTER)
    fake = sys.modules["vllm"]
    monkeypatch.setattr(found, "time", SimpleNamespace(perf_counter=lambda: fake.seconds))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    return found


def job(**more: Any) -> Job:
    fields: dict[str, Any] = {"device": "cuda", "max_memory": None, "cases": (CASE,)} | more
    return Job(engine="vllm", model=tiny.EXAMPLE, dtype="bfloat16", trust=False, repeats=1, seconds=60.0, **fields)


def test_the_prompt_is_timed_by_one_token_and_decoding_by_what_more_take(adapter: ModuleType) -> None:
    run = adapter.load(job()).generate(CASE, prompts.equal(range(2, 100), 2, 8))
    assert run.first == pytest.approx(1.0)
    assert run.steps == [pytest.approx(0.5)]
    assert run.decode == pytest.approx(2.0)
    assert [len(tokens) for tokens in run.tokens] == [5, 5]


def test_continuous_requests_are_one_call(adapter: ModuleType) -> None:
    case = Case(3, 8, 5, continuous=True, cache="paged")
    run = adapter.load(job()).generate(case, prompts.mixed(range(2, 100), 3, 8))
    assert (run.decode, run.steps) == (pytest.approx(3.0), [])
    assert len(run.tokens) == 3


def test_it_asks_for_what_is_timed_and_caches_no_prompts(adapter: ModuleType) -> None:
    longer = Case(1, 900, 200)  # more than the model allows: it is refused later and must not stop the others
    adapter.load(job(cases=(CASE, longer), max_memory=500))
    (settings,) = sys.modules["vllm"].made
    assert settings["enable_prefix_caching"] is False
    assert settings["max_model_len"] == 13
    assert settings["gpu_memory_utilization"] == 0.5
    assert settings["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("free", "max_memory", "share"), [(1000, None, 0.9), (600, None, 0.57), (600, 500, 0.5), (600, 800, 0.57)]
)
def test_it_takes_what_is_free_and_allowed(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, free: int, max_memory: int | None, share: float
) -> None:
    """Whoever measures still holds what the baseline predicts, and others may be on the device as well."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    adapter.load(job(max_memory=max_memory))
    assert sys.modules["vllm"].made[0]["gpu_memory_utilization"] == pytest.approx(share)


def test_what_it_moves_is_what_is_stored(adapter: ModuleType) -> None:
    engine = adapter.load(job())
    work = engine.work
    assert work.weight_bytes == work.read_bytes  # the head is the embedding
    assert (work.body, work.head) == (4_718_592, 4096 * 256)
    assert (work.kv_bytes, work.attention) == (2 * 6 * 2 * 64 * 2, 2 * 6 * 4 * 64)
    assert engine.memory is None
    assert 0 not in engine.vocabulary


def test_it_needs_cuda(adapter: ModuleType) -> None:
    with pytest.raises(UsageError, match="vLLM needs CUDA"):
        adapter.load(job(device="cpu"))
