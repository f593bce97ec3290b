"""Gates: limits on what compression may cost, checked against what was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.request import Gates

Section = Mapping[str, Any]


def evaluate(
    gates: Gates, fidelity: Section, size: Section, tasks: Section | None = None, speed: Section | None = None
) -> list[dict[str, Any]]:
    """One entry {name, limit, value, passed} per gate that is set, in a fixed order.

    The arguments are those sections of the report, fresh or read back from report.json; size needs only
    `output_bytes`. A value that is not a finite number fails its gate: a model that cannot be measured has not been
    shown to be good.
    """
    measured = (
        ("max-kl", gates.max_kl, (fidelity["kl"] or {}).get("mean")),
        ("max-perplexity-increase", gates.max_perplexity_increase, fidelity["perplexity"]["increase"]),
        ("min-agreement", gates.min_agreement, (fidelity["agreement"] or {}).get("top1")),
        ("max-size", gates.max_size, size["output_bytes"]),
        ("min-recovery", gates.min_recovery, recovery(tasks)),
        ("min-tokens-per-second", gates.min_tokens_per_second, throughput(speed)),
    )
    return [
        {"name": name, "limit": limit, "value": value, "passed": _holds(name, limit, value)}
        for name, limit, value in measured
        if limit is not None
    ]


def recovery(tasks: Section | None) -> float | None:
    """The lowest share of the baseline's score that any task kept; None if none was compared."""
    shares = [row["recovery"] for row in tasks["rows"] if row["recovery"] is not None] if tasks else []
    return min(shares, default=None)


def throughput(speed: Section | None) -> float | None:
    """The most tokens per second that any setting generated; None if none did."""
    rates = [row["tokens_per_second"] for row in speed["rows"] if row["mode"] == "decode"] if speed else []
    return max(rates, default=None)


def _holds(name: str, limit: float, value: float | None) -> bool:
    if value is None or not math.isfinite(value):
        return False
    return value >= limit if name.startswith("min-") else value <= limit


def measurable(fidelity: Section) -> bool:
    """Whether every perplexity is finite. A model without one has not been shown to be good, gates or none.

    That of the original counts if there was one, which is when there is a divergence.
    """
    perplexity = fidelity["perplexity"]
    measured = [perplexity["compressed"]] + [perplexity["dense"]] * (fidelity["kl"] is not None)
    return all(value is not None and math.isfinite(value) for value in measured)


def verdict(gates: Sequence[Section], *, strict: bool, fallbacks: Sequence[object], warnings: Sequence[object]) -> bool:
    """Whether the run passed: every gate holds and, when strict, nothing fell back and nothing was warned of."""
    return all(gate["passed"] for gate in gates) and not (strict and (fallbacks or warnings))


def reasons(report: Section) -> list[str]:
    """Why a report that did not pass did not: each failed gate with limit and value, each part of the measurement that
    failed, or what else there is.
    """
    failed = [describe(gate) for gate in report["gates"] if not gate["passed"]]
    failed += [f"{each['model']}: {each['part']}: {each['why']}" for each in report.get("failures", [])]
    if failed:
        return failed
    models = report.get("candidates", [{"fidelity": report.get("fidelity")}])
    unmeasured = [model for model in models if not measurable(model["fidelity"])]
    if unmeasured:
        return [_perplexity(model, several=len(models) > 1) for model in unmeasured]
    counts = [(len(report["fallbacks"]), "fallback"), (len(report["warnings"]), "warning")]
    return ["--strict: " + " and ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts if n)]


def _perplexity(model: Section, *, several: bool) -> str:
    perplexity = model["fidelity"]["perplexity"]
    before = f"{show.figure(perplexity['dense'])} -> " if model["fidelity"]["kl"] is not None else ""
    return f"{model['name'] + ': ' if several else ''}perplexity: {before}{show.figure(perplexity['compressed'])}"


def describe(gate: Section) -> str:
    """'max-kl: 0.06120, the limit is 0.05'; with several models 'name: max-kl: …'."""
    value, limit = figures(gate)
    return f"{gate['name']}: {value}, the limit is {limit}"


def figures(gate: Section) -> tuple[str, str]:
    """The gate's value and its limit as people read them."""
    value, limit = gate["value"], gate["limit"]
    kind = gate["name"].rpartition(": ")[2]
    if kind in ("max-size", "against-size"):
        return show.size(value), show.size(limit)
    if kind in ("max-kl", "min-tokens-per-second"):
        return show.figure(value), f"{limit:g}"
    if kind.endswith(("-increase", "-agreement", "-recovery")):
        return show.percent(value, 2), show.percent(limit, 2)
    return show.figure(value), show.figure(limit)
