import math
from typing import Any

import pytest
import samples

from llmpare.compress.report import gates
from llmpare.compress.request import Gates

ALL = Gates(max_kl=0.003, max_perplexity_increase=0.01, min_agreement=0.95, max_size=5_000_000)


def evaluate(limits: Gates, report: dict[str, Any]) -> list[dict[str, Any]]:
    return gates.evaluate(limits, report["fidelity"], report["size"])


def test_gates_that_are_not_set_are_not_in_the_report() -> None:
    assert evaluate(Gates(), samples.report()) == []
    assert [g["name"] for g in evaluate(Gates(min_agreement=0.5), samples.report())] == ["min-agreement"]


def test_all_gates_hold_and_say_what_was_measured() -> None:
    found = evaluate(ALL, samples.report())
    assert [(g["name"], g["limit"], g["value"], g["passed"]) for g in found] == [
        ("max-kl", 0.003, 0.00286, True),
        ("max-perplexity-increase", 0.01, 0.00206, True),
        ("min-agreement", 0.95, 0.9591, True),
        ("max-size", 5_000_000, 4_537_000, True),
    ]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Gates(max_kl=0.002), "max-kl: 0.002860, the limit is 0.002"),
        (Gates(max_perplexity_increase=0.001), "max-perplexity-increase: 0.21 %, the limit is 0.10 %"),
        (Gates(min_agreement=0.97), "min-agreement: 95.91 %, the limit is 97.00 %"),
        (Gates(max_size=4_000_000), "max-size: 4.54 MB, the limit is 4 MB"),
    ],
)
def test_a_failed_gate_says_metric_limit_and_value(limits: Gates, said: str) -> None:
    report = samples.report()
    report["gates"] = evaluate(limits, report)
    assert not report["gates"][0]["passed"]
    assert gates.reasons(report) == [said]


def test_a_value_on_the_limit_passes() -> None:
    assert evaluate(Gates(max_kl=0.00286, min_agreement=0.9591), samples.report()) == [
        {"name": "max-kl", "limit": 0.00286, "value": 0.00286, "passed": True},
        {"name": "min-agreement", "limit": 0.9591, "value": 0.9591, "passed": True},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_could_not_be_measured_fails(value: float | None) -> None:
    """None is what NaN became in report.json; -inf would be below every limit and must not pass either."""
    report = samples.report()
    report["fidelity"]["kl"]["mean"] = value
    report["fidelity"]["perplexity"]["increase"] = value
    report["fidelity"]["agreement"]["top1"] = value
    assert [g["passed"] for g in evaluate(ALL, report)] == [False, False, False, True]
    report["gates"] = evaluate(ALL, report)
    assert "max-kl: not finite, the limit is 0.003" in gates.reasons(report)


def test_strict_minds_fallbacks_and_warnings() -> None:
    passed = [{"passed": True}]
    assert gates.verdict(passed, strict=False, fallbacks=["one"], warnings=["two"])
    assert gates.verdict(passed, strict=True, fallbacks=[], warnings=[])
    assert not gates.verdict(passed, strict=True, fallbacks=["one"], warnings=[])
    assert not gates.verdict(passed, strict=True, fallbacks=[], warnings=["two"])
    assert not gates.verdict([{"passed": True}, {"passed": False}], strict=False, fallbacks=[], warnings=[])


def test_strict_says_what_it_minds() -> None:
    report = samples.report()
    report["warnings"] *= 2
    assert gates.reasons(report) == ["--strict: 1 fallback and 2 warnings"]
