"""Whether a model got worse than it was in an earlier report, beyond what noise explains.

Both reports must have measured on the same text and tasks, against the same original and as much of what it predicts,
in the same precision, and speed on the same machine: then a model that did not change gives the same figures, and noise
is what a change too small to matter could look like on other text. A figure has got worse when it moved by more than

- perplexity, KL, agreement, scores on tasks: 2 combined standard errors, sqrt(s² + s'²) each. Where there is an
  original, perplexity is compared as its increase over it, whose error is by pairs and therefore small;
- scores that have no standard error: 5 %;
- tokens per second: 2 combined spreads, and at least 5 %, since machines vary from run to run;
- bytes: nothing. A size has no noise.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.files import read_json, shown
from llmpare.compress.errors import InputError
from llmpare.compress.report import show
from llmpare.compress.report.subjects import baseline, subjects

ERRORS = 2.0
"""Combined standard errors, or spreads, that a figure may move by."""

SPEED_NOISE = 0.05
"""The least share by which tokens per second may fall."""

SCORE_NOISE = 0.05
"""The share of itself by which a score may get worse that has no standard error, such as an F1 over all documents."""

MAX_BYTES = 2**28

AGAIN = "evaluate anew without --against to have a report that later ones can be compared with"

Report = Mapping[str, Any]


def load(path: Path) -> dict[str, Any]:
    """An earlier report.json. Raises InputError if it cannot be read or is none."""
    report = read_json(path, limit=MAX_BYTES)
    if not {"schema_version", "command", "gates"} <= report.keys():
        raise InputError(f"{shown(path)} is no report of llmpare", "--against takes the report.json of an earlier run")
    return report


def precision(report: Report) -> str:
    """What its models ran in, by torch's name."""
    dtype: str = subjects(report)[0]["fidelity"]["dtype"]
    return dtype.removeprefix("torch.")


def require_comparable(report: Report, previous: Report) -> None:
    """Raises InputError if the figures of one report would say nothing about those of the other.

    report: the new one, which needs no figures yet: its schema, command, text and original, and of each model the name,
    the precision and the machine that its speed is measured on; and the request.
    """
    facts = (
        ("schema", lambda each: each["schema_version"]),
        ("command", lambda each: each["command"]),
        ("evaluation text", lambda each: each["evaluation"]["sha256"]),
        ("windows of text", lambda each: (each["evaluation"]["windows"], each["evaluation"]["seqlen"])),
        ("original", lambda each: (baseline(each) or {}).get("weights_sha256")),
        ("part of its predictions", lambda each: _kept((baseline(each) or {}).get("saved"))),
    )
    for name, fact in facts:
        now, before = fact(report), fact(previous)
        if now != before:
            was, has = _short(before), _short(now)
            raise InputError(f"--against: another {name}: {was} in the earlier report, {has} in this one", AGAIN)
    now, before = precision(report), precision(previous)
    if now != before:
        raise InputError(
            f"--against: another precision: {before} in the earlier report, {now} in this one", f"give --dtype {before}"
        )
    if report["evaluation"]["windows"] < 2:
        raise InputError("--against: a single window of text tells nothing about noise", "evaluate on a longer text")
    _require_same_tasks(report, previous)
    for new, old in _pairs(report, previous):
        if new["speed"] and old["speed"]:
            now, before = new["speed"]["machine"]["device"], old["speed"]["machine"]["device"]
            if now != before:
                raise InputError(
                    f"--against: speed was measured on {shown(before)}, now on {shown(now)}",
                    "compare on one kind of machine, or leave out --speed",
                )


def _kept(saved: Report | None) -> str:
    """How much of what the original predicts the divergence is over."""
    return "all tokens" if saved is None else f"top {saved['top_k']} tokens"


def _require_same_tasks(report: Report, previous: Report) -> None:
    """Scores on other documents, or with other examples before them, differ by more than noise."""
    now, before = report["request"].get("tasks"), previous["request"].get("tasks")
    if now is None or before is None:
        return
    for name in ("limit", "num_fewshot"):
        if now[name] != before[name]:
            what = f"another --{name.replace('_', '-')} of tasks"
            raise InputError(f"--against: {what}: {before[name]} in the earlier report, {now[name]} in this one", AGAIN)


def regressions(report: Report, previous: Report) -> list[dict[str, Any]]:
    """One entry {name, limit, value, passed} per figure that both reports have, like a gate's.

    The two must be comparable. A figure that is not finite any more fails. With several models a name begins with that
    of its model. Models are matched by name; a single model is compared with a single one whatever they are called.
    """
    pairs = list(_pairs(report, previous))
    return [
        {**entry, "name": f"{now['name']}: {entry['name']}" if len(pairs) > 1 else entry["name"]}
        for now, before in pairs
        for entry in _entries(now, before)
    ]


def missing(report: Report, previous: Report) -> list[str]:
    """A warning if the earlier report has figures that this one lacks: what is not measured does not get worse."""
    lost = []
    for now, before in _pairs(report, previous):
        there = {entry["name"] for entry in _entries(now, before)}
        lost += [entry["name"] for entry in _entries(before, before) if entry["name"] not in there]
    if not lost:
        return []
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return [f"only the earlier report has figures for {', '.join(lost[:3])}{more}: they are not compared"]


def _entries(now: Report, before: Report) -> list[dict[str, Any]]:
    return [*_fidelity(now, before), _size(now, before), *_tasks(now, before), *_speed(now, before)]


def _short(fact: object) -> str:
    return shown(fact[:16] if isinstance(fact, str) else fact)


def _pairs(report: Report, previous: Report) -> Iterator[tuple[Report, Report]]:
    """Each model with what it was."""
    now, before = subjects(report), subjects(previous)
    if len(now) == len(before) == 1:
        yield now[0], before[0]
        return
    named = {subject["name"]: subject for subject in before}
    for subject in now:
        if subject["name"] not in named:
            raise InputError(f"--against: the earlier report has no model {shown(subject['name'])}", AGAIN)
        yield subject, named[subject["name"]]


def _entry(name: str, limit: float, value: float | None, *, least: bool = False) -> dict[str, Any]:
    passed = value is not None and math.isfinite(value) and (value >= limit if least else value <= limit)
    return {"name": f"against-{name}", "limit": limit, "value": value, "passed": passed}


def _fidelity(now: Report, before: Report) -> Iterator[dict[str, Any]]:
    """Perplexity, and with an original KL and agreement. What was not finite before bounds nothing."""
    new, old = now["fidelity"], before["fidelity"]
    paired = old["kl"] is not None and new["kl"] is not None
    name, figure, error = (
        ("perplexity-increase", "increase", "increase_stderr")
        if paired
        else ("perplexity", "compressed", "compressed_stderr")
    )
    measures = [(name, new["perplexity"], old["perplexity"], figure, error)]
    if paired:
        measures.append(("kl", new["kl"], old["kl"], "mean", "stderr"))
        measures.append(("agreement", new["agreement"], old["agreement"], "top1", "stderr"))
    for name, current, earlier, figure, error in measures:
        if earlier[figure] is None or not math.isfinite(earlier[figure]):
            continue
        least = name == "agreement"
        noise = _noise(current.get(error), earlier.get(error))
        limit = earlier[figure] - noise if least else earlier[figure] + noise
        yield _entry(name, limit, current[figure], least=least)


def _noise(current: float | None, earlier: float | None) -> float:
    """2 combined standard errors; one that is not finite belongs to a figure that fails anyway."""
    finite = [error for error in (current, earlier) if error is not None and math.isfinite(error)]
    return ERRORS * math.hypot(*finite)


def _size(now: Report, before: Report) -> dict[str, Any]:
    return _entry("size", before["size"]["bytes"], now["size"]["bytes"])


def _tasks(now: Report, before: Report) -> Iterator[dict[str, Any]]:
    earlier = {(row["task"], row["metric"]): row for row in (before["tasks"] or {}).get("rows", [])}
    for row in (now["tasks"] or {}).get("rows", []):
        old = earlier.get((row["task"], row["metric"]))
        if old is None or old["value"] is None:
            continue
        least = row["higher_is_better"]
        known = row["stderr"] is not None or old["stderr"] is not None
        noise = _noise(row["stderr"], old["stderr"]) if known else SCORE_NOISE * abs(old["value"])
        limit = old["value"] - noise if least else old["value"] + noise
        yield _entry(f"{row['task']}-{row['metric']}", limit, row["value"], least=least)


SETTING = ("engine", "mode", "batch", "prompt", "new_tokens", "cache", "compiled", "attention")


def _speed(now: Report, before: Report) -> Iterator[dict[str, Any]]:
    new, old = now["speed"], before["speed"]
    if not new or not old:
        return
    earlier = {tuple(row[key] for key in SETTING): row for row in old["rows"]}
    for row in new["rows"]:
        match = earlier.get(tuple(row[key] for key in SETTING))
        if match is not None:
            noise = max(SPEED_NOISE, ERRORS * math.hypot(row["spread"], match["spread"]))
            limit = match["tokens_per_second"] * (1 - min(noise, 1.0))
            yield _entry(f"tokens-per-second {_setting(row)}", limit, row["tokens_per_second"], least=True)


def _setting(row: Report) -> str:
    """'(transformers, decode, batch 4, prompt 128, dynamic cache, sdpa attention)'."""
    return f"({row['engine']}, {row['mode']}, batch {row['batch']}, prompt {row['prompt']}, {show.setting(row)})"
