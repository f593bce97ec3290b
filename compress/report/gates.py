"""Gates: limits on what compression may cost, checked against what was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.request import Gates


def evaluate(gates: Gates, fidelity: Mapping[str, Any], size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry {name, limit, value, passed} per gate that is set, in a fixed order.

    fidelity and size are those sections of the report, fresh or read back from report.json. A value that is
    not a finite number fails its gate: a model that cannot be measured has not been shown to be good.
    """
    measured = (
        ("max-kl", gates.max_kl, fidelity["kl"]["mean"]),
        ("max-perplexity-increase", gates.max_perplexity_increase, fidelity["perplexity"]["increase"]),
        ("min-agreement", gates.min_agreement, fidelity["agreement"]["top1"]),
        ("max-size", gates.max_size, size["output_bytes"]),
    )
    return [
        {"name": name, "limit": limit, "value": value, "passed": _holds(name, limit, value)}
        for name, limit, value in measured
        if limit is not None
    ]


def _holds(name: str, limit: float, value: float | None) -> bool:
    if value is None or not math.isfinite(value):
        return False
    return value >= limit if name.startswith("min-") else value <= limit


def measurable(fidelity: Mapping[str, Any]) -> bool:
    """Whether both perplexities are finite. A model without one has not been shown to be good, gates or none."""
    both = fidelity["perplexity"]["dense"], fidelity["perplexity"]["compressed"]
    return all(value is not None and math.isfinite(value) for value in both)


def verdict(
    gates: Sequence[Mapping[str, Any]],
    *,
    strict: bool,
    fallbacks: Sequence[object],
    warnings: Sequence[object],
) -> bool:
    """Whether the run passed: every gate holds and, when strict, nothing fell back and nothing was warned of."""
    return all(gate["passed"] for gate in gates) and not (strict and (fallbacks or warnings))


def reasons(report: Mapping[str, Any]) -> list[str]:
    """Why a report that did not pass did not: each failed gate with limit and value, or what else there is."""
    failed = [describe(gate) for gate in report["gates"] if not gate["passed"]]
    if failed:
        return failed
    if not measurable(report["fidelity"]):
        perplexity = report["fidelity"]["perplexity"]
        return [f"perplexity: {show.figure(perplexity['dense'])} -> {show.figure(perplexity['compressed'])}"]
    counts = [(len(report["fallbacks"]), "fallback"), (len(report["warnings"]), "warning")]
    return ["--strict: " + " and ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts if n)]


def describe(gate: Mapping[str, Any]) -> str:
    """'max-kl: 0.06120, the limit is 0.05'."""
    value, limit = figures(gate)
    return f"{gate['name']}: {value}, the limit is {limit}"


def figures(gate: Mapping[str, Any]) -> tuple[str, str]:
    """The gate's value and its limit as people read them."""
    value, limit = gate["value"], gate["limit"]
    if gate["name"] == "max-size":
        return show.size(value), show.size(limit)
    if gate["name"] == "max-kl":
        return show.figure(value), f"{limit:g}"
    return show.percent(value, 2), show.percent(limit, 2)
