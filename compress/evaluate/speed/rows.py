"""From what a worker timed to the rows of the report."""

import statistics
from collections.abc import Mapping
from typing import Any

from llmpare.compress.evaluate.speed import roofline
from llmpare.compress.evaluate.speed.engine import Case, Work
from llmpare.compress.evaluate.speed.timing import milliseconds, spread


def rows(
    engine: str, case: Case, sample: Mapping[str, Any], work: Work, weights: str, machine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for the prompt and one for the decoding of a case, or a single one for continuous batching.

    sample: the fields of worker.Sample. tokens_per_second counts all sequences together: prompt tokens in a row of
    mode 'prefill', new tokens but the first in 'decode', all new tokens in 'continuous'; it is the median over the
    repetitions, and `spread` is the distance between their quartiles as a share of it.
    """
    shared = {
        "engine": engine,
        "batch": case.batch,
        "prompt": case.prompt,
        "new_tokens": case.new_tokens,
        "cache": case.cache,
        "compiled": case.compiled,
        "attention": case.attention,
        "weights": weights,
        "weight_bytes": work.weight_bytes,
        "peak_bytes": sample["peak_bytes"],
        "memory": sample["memory"],
        "warmup": sample["warmup"],
        "repeats": len(sample["decode"]),
    }
    if case.continuous:
        timed = _throughput(sample["new_tokens"], sample["decode"])
        nothing = {"bandwidth_share": None, "compute_share": None}
        return [{"mode": "continuous", **shared, "ttft_ms": None, "tpot_ms": None, **timed, "roofline": nothing}]
    first, decode = sample["first"], sample["decode"]
    ttft = milliseconds(first)
    prefill = {
        "ttft_ms": ttft,
        "tpot_ms": None,
        **_throughput(sample["prompt_tokens"], first),
        "roofline": roofline.shares(work, case, statistics.median(first), decode=False, machine=machine),
    }
    decoding = {
        "ttft_ms": ttft,
        "tpot_ms": milliseconds(sample["steps"]),
        **_throughput(sample["new_tokens"] - case.batch, decode),
        "roofline": roofline.shares(work, case, statistics.median(decode), decode=True, machine=machine),
    }
    return [{"mode": "prefill", **shared, **prefill}, {"mode": "decode", **shared, **decoding}]


def _throughput(tokens: int, seconds: list[float]) -> dict[str, float]:
    rates = [tokens / each for each in seconds]
    return {"tokens_per_second": statistics.median(rates), "spread": spread(rates)}
