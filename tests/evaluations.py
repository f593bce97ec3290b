"""Complete, plausible reports of `llmpare evaluate` that several tests start from; samples.py has quantize's."""

import math
from collections.abc import Sequence
from typing import Any

import samples

from llmpare.compress.evaluate.request import EvaluateRequest


def evaluation(names: Sequence[str] = ("out/w4",), *, speed: bool = True, tasks: bool = True) -> dict[str, Any]:
    """A report on these candidates, each a little worse than the one before, with one of everything it can hold."""
    base = samples.report()
    candidates = [_candidate(name, place, speed, tasks) for place, name in enumerate(names)]
    return {
        "schema_version": 1,
        "command": "evaluate",
        "passed": True,
        "request": EvaluateRequest(tuple(names), "models/dense").spec(),
        "baseline": {**_source("models/dense", "dense", 11_540_992), "saved": None, "speed": None},
        "evaluation": {**base["evaluation"], "ids_sha256": "d" * 64, "scored_bytes": 24_011},
        "candidates": candidates,
        "warnings": [],
        "failures": [],
        "gates": [gate for candidate in candidates for gate in candidate["gates"]],
        "fallbacks": [],
        "cost": base["cost"],
        "environment": base["environment"],
    }


def _candidate(name: str, place: int, speed: bool, tasks: bool) -> dict[str, Any]:
    kl = 0.003 * 2**place
    size = 4_537_504 - 600_000 * place
    return {
        "name": name,
        "source": _source(name, "compressed-tensors W4A16 g128", size),
        "size": {
            "bytes": size,
            "baseline_bytes": 11_540_992,
            "ratio": size / 11_540_992,
            "linear_bits_per_weight": 4.126 - place,
            "parameters": 5_770_496,
        },
        "fidelity": _fidelity(kl),
        "domains": [
            {
                "name": domain,
                "tokens": 1024 + 512 * i,
                "perplexity": {"dense": 150.0 + 20 * i, "compressed": (150.0 + 20 * i) * (1 + kl)},
                "kl": kl * (0.7 + 0.15 * i),
                "top1": 1 - 15 * kl * (0.7 + 0.1 * i),
            }
            for i, domain in enumerate(("chat", "code", "prose", "science"))
        ],
        "worst": [
            {
                "kl": 0.4 - 0.01 * i,
                "context": "The harbour master wrote the number of the boat on a slate\nand hung it on",
                "next": " the",
                "dense_next": " the",
                "compressed_next": " a",
                "window": i,
                "position": 17 * (i + 1),
            }
            for i in range(6)
        ],
        "tasks": {"rows": [_task(task, place) for task in ("arc_easy", "hellaswag")]} if tasks else None,
        "speed": _speed(place) if speed else None,
        "gates": [{"name": "max-kl", "limit": 0.05, "value": kl, "passed": True}],
        "passed": True,
    }


def _source(model: str, scheme: str, size: int) -> dict[str, Any]:
    return {
        "model": model,
        "architecture": "LlamaForCausalLM",
        "scheme": scheme,
        "weight_bytes": size,
        "parameters": 5_770_496,
        "weights_sha256": "c" * 64,
    }


def _fidelity(kl: float) -> dict[str, Any]:
    edges = [0.0] + [10 ** (-6 + i / 4) for i in range(25)]
    counts = [round(2000 * math.exp(-((math.log10(edge / kl) / 0.55) ** 2))) for edge in edges[1:]]
    return {
        "tokens": 8160,
        "windows": 32,
        "dtype": "bfloat16",
        "perplexity": {
            "dense": 177.36,
            "compressed": 177.36 * (1 + 2 * kl),
            "increase": 2 * kl,
            "increase_stderr": kl / 5,
            "dense_stderr": 20.0,
            "compressed_stderr": 20.1,
        },
        "bits_per_byte": {"dense": 1.843, "compressed": 1.843 + kl / 4},
        "kl": {
            "mean": kl,
            "stderr": kl / 18,
            "median": 0.73 * kl,
            "p90": 2.1 * kl,
            "p99": 4.6 * kl,
            "max": 18 * kl,
            "histogram": {"edges": edges, "counts": counts},
        },
        "agreement": {"top1": 1 - 15 * kl, "top5": 1 - 9 * kl, "stderr": 0.003},
        "by_position": [
            {
                "start": 8 * i,
                "end": 8 * i + 8,
                "kl": kl * (0.9 + 1.4 / (i + 2) + 0.07 * math.sin(3 * i)),
                "top1": 1 - 15 * kl * (0.9 + 0.5 / (i + 1) - 0.1 * math.cos(2 * i)),
            }
            for i in range(32)
        ],
    }


def _task(task: str, place: int) -> dict[str, Any]:
    value = 0.712 - 0.004 * place
    return {
        "task": task,
        "metric": "acc",
        "higher_is_better": True,
        "value": value,
        "stderr": 0.0093,
        "baseline": 0.715,
        "recovery": value / 0.715,
        "flips": {"lost": 12 + place, "gained": 9, "p_value": 0.66},
    }


def _speed(place: int) -> dict[str, Any]:
    rows = []
    for batch in (1, 2, 4, 8, 16):
        rows.append(_timing("decode", batch, 128, 90.0 * batch**0.7 * (1 + 0.4 * place)))
    for prompt in (64, 128, 256, 512):
        rows.append(_timing("prefill", 1, prompt, 900.0 * prompt**0.2 * (1 + 0.1 * place)))
    machine = {"bandwidth_gb_s": 18.4, "gflops": 92.0, "device": "cpu"}
    skipped = [{"engine": "vllm", "what": "all", "why": "not installed"}]
    return {"rows": rows, "machine": machine, "skipped": skipped}


def _timing(mode: str, batch: int, prompt: int, rate: float) -> dict[str, Any]:
    per_step = 1000 * (batch if mode == "decode" else batch * prompt) / rate
    latency = {"median": per_step, "p90": 1.1 * per_step}
    return {
        "engine": "transformers",
        "mode": mode,
        "batch": batch,
        "prompt": prompt,
        "new_tokens": 32,
        "cache": "dynamic",
        "compiled": False,
        "attention": "sdpa",
        "ttft_ms": latency if mode == "prefill" else None,
        "tpot_ms": latency if mode == "decode" else None,
        "tokens_per_second": rate,
        "peak_bytes": 700_000_000,
        "weight_bytes": 4_537_504,
        "warmup": 2,
        "repeats": 10,
        "spread": 0.03,
        "roofline": {"bandwidth_share": 0.41, "compute_share": 0.12},
    }
