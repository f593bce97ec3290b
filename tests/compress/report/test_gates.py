import math
from typing import Any

import evaluations
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


TASKS = {"rows": [{"recovery": 1.01}, {"recovery": 0.98}, {"recovery": None}]}
SPEED = {
    "rows": [
        {"mode": "prefill", "tokens_per_second": 9000.0},
        {"mode": "decode", "tokens_per_second": 70.0},
        {"mode": "decode", "tokens_per_second": 350.0},
    ]
}


def test_the_worst_task_and_the_best_throughput_count() -> None:
    report = samples.report()
    limits = Gates(min_recovery=0.99, min_tokens_per_second=300)
    found = gates.evaluate(limits, report["fidelity"], report["size"], TASKS, SPEED)
    assert [(gate["name"], gate["value"], gate["passed"]) for gate in found] == [
        ("min-recovery", 0.98, False),
        ("min-tokens-per-second", 350.0, True),
    ]
    assert gates.describe(found[0]) == "min-recovery: 98.00 %, the limit is 99.00 %"
    assert gates.describe(found[1]) == "min-tokens-per-second: 350.0, the limit is 300"


def test_what_was_not_measured_fails() -> None:
    report = samples.report()
    limits = Gates(min_recovery=0.1, min_tokens_per_second=1)
    for tasks, speed in ((None, None), ({"rows": []}, {"rows": []}), ({"rows": [{"recovery": None}]}, None)):
        found = gates.evaluate(limits, report["fidelity"], report["size"], tasks, speed)
        assert [gate["passed"] for gate in found] == [False, False]


def test_without_an_original_nothing_is_compared() -> None:
    fidelity = samples.report()["fidelity"] | {"kl": None, "agreement": None}
    fidelity["perplexity"] |= {"dense": None, "increase": None}
    assert gates.measurable(fidelity)
    found = gates.evaluate(Gates(max_kl=1.0, min_agreement=0.1), fidelity, {"output_bytes": 1})
    assert [gate["passed"] for gate in found] == [False, False]


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_a_candidate_that_gives_no_numbers_is_named(which: str) -> None:
    report = evaluations.evaluation(("one", "two"))
    report["candidates"][1]["fidelity"]["perplexity"][which] = math.nan
    said = gates.reasons(report)
    assert len(said) == 1
    assert said[0].startswith("two: perplexity: ")
    assert "not finite" in said[0]


def test_gates_of_several_models_are_shown_like_those_of_one() -> None:
    assert gates.describe({"name": "a: b: max-size", "limit": 4e6, "value": 5e6}) == (
        "a: b: max-size: 5 MB, the limit is 4 MB"
    )
    assert "0.1234" in gates.describe({"name": "against-kl", "limit": 0.1234, "value": 0.2})
