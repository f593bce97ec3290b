"""The measurement of one checkpoint: the machine, then each engine in a process of its own, then the report's rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmpare.compress import devices
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.speed import cases, machine
from llmpare.compress.evaluate.speed import engines as registry
from llmpare.compress.evaluate.speed.check import check
from llmpare.compress.evaluate.speed.engine import OWN, Job, Work
from llmpare.compress.evaluate.speed.rows import rows
from llmpare.compress.evaluate.speed.supervise import supervise
from llmpare.compress.progress import Progress

__all__ = ["check", "measure"]

GROWING_SECONDS = 60.0  # for larger and larger batches, where no sizes are named


def measure(
    model: Path,
    *,
    engines: Sequence[str] = ("transformers",),
    batches: Sequence[int] | None = None,
    prompts: Sequence[int] = cases.PROMPTS,
    new_tokens: int = cases.NEW_TOKENS,
    repeats: int = cases.REPEATS,
    variations: Sequence[str] | None = None,
    device: torch.device,
    dtype: torch.dtype,
    trust: bool = False,
    max_memory: int | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """The section `speed` of a report: {"rows", "machine", "skipped"}; rows.py says what a row holds.

    model: a folder, or a .gguf file. batches: sizes to measure; None doubles from 1 until memory or a minute ends.
    prompts: lengths in tokens; the first is that of all variations. new_tokens: per sequence, at least 2.
    variations: names of cases.VARIATIONS; None is every one the engine knows. max_memory: bytes a process of an
    engine may hold; None is what the device has. Whatever could not be measured is in `skipped`, with the reason.

    Raises UsageError for settings that make no sense and engines that are not there, InputError when a checkpoint
    suits no engine or when not a single case could be measured.
    """
    check(
        model, engines, batches=batches, prompts=prompts, new_tokens=new_tokens, repeats=repeats, variations=variations
    )
    progress.phase("timing the machine")
    roof = machine.measure(device, dtype)
    devices.release()  # engines run in processes of their own
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for name in engines:
        progress.phase(f"timing {name}")
        entry = registry.ENGINES[name]
        wanted = [each for each in entry.variations if variations is None or each in variations]
        base = replace(entry.base, new_tokens=new_tokens)
        chosen = cases.choose(base, wanted, batches=batches, prompts=prompts, batched=entry.batched)
        if batches and max(batches) > 1 and not entry.batched:
            skipped.append({"engine": name, "what": "batches", "why": "it runs one sequence at a time here"})
        limit = GROWING_SECONDS if batches is None else float("inf")
        job = Job(name, model, str(device), _name(dtype), trust, tuple(chosen), repeats, max_memory, limit)
        work, weights, attention = Work(0), "", OWN
        for event in supervise(job):
            if "loaded" in event:
                work, weights = Work(**event["loaded"]["work"]), event["loaded"]["weights"]
                attention = event["loaded"]["attention"]
                continue
            case = event["case"]
            if case is not None and case.attention == OWN:
                case = replace(case, attention=attention)
            if "sample" in event:
                found += rows(name, case, event["sample"], work, weights, roof)
            else:
                skipped.append({"engine": name, "what": case.label if case else "loading", "why": event["why"]})
    if not found:
        raise InputError(f"no speed could be measured: {_reasons(skipped)}", "leave out --speed, or choose --engines")
    return {"rows": found, "machine": roof, "skipped": skipped}


def _reasons(skipped: Sequence[dict[str, str]]) -> str:
    """Why each was not measured, once for all that share the reason."""
    shared: dict[tuple[str, str], list[str]] = {}
    for each in skipped:
        shared.setdefault((each["engine"], each["why"]), []).append(each["what"])
    return "; ".join(
        f"{engine}, {what}{f' and {len(more)} more' if more else ''}: {why}"
        for (engine, why), (what, *more) in shared.items()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
