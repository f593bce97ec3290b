import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import samples
from evaluations import evaluation

from llmpare.compress.errors import InputError
from llmpare.compress.report import against, gates


def failed(report: dict[str, Any], previous: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in against.regressions(report, previous) if not entry["passed"]]


def first(report: dict[str, Any]) -> Any:
    return report["candidates"][0]


def test_a_model_that_did_not_change_passes_and_every_figure_is_compared() -> None:
    report = evaluation()
    entries = against.regressions(report, copy.deepcopy(report))
    assert all(entry["passed"] for entry in entries)
    names = [entry["name"] for entry in entries]
    assert names[:5] == [
        "against-perplexity-increase", "against-kl", "against-agreement", "against-size", "against-arc_easy-acc",
    ]  # fmt: skip
    assert sum(name.startswith("against-tokens-per-second") for name in names) == len(first(report)["speed"]["rows"])
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("section", "figure", "error", "worse", "name"),
    [
        (("fidelity", "perplexity"), "increase", "increase_stderr", +1, "against-perplexity-increase"),
        (("fidelity", "kl"), "mean", "stderr", +1, "against-kl"),
        (("fidelity", "agreement"), "top1", "stderr", -1, "against-agreement"),
        (("tasks", "rows", 0), "value", "stderr", -1, "against-arc_easy-acc"),
    ],
)
def test_a_figure_may_get_worse_by_two_combined_standard_errors(
    section: tuple[Any, ...], figure: str, error: str, worse: int, name: str
) -> None:
    previous = evaluation(speed=False)
    for share, expected in ((0.99, []), (1.01, [name]), (-50.0, [])):
        report = copy.deepcopy(previous)
        now = first(report)
        for key in section:
            now = now[key]
        combined = 2 * math.sqrt(now[error] ** 2 + (2 * now[error]) ** 2)
        now[figure] += worse * share * combined
        now[error] *= 2
        assert failed(report, previous) == expected, share


def test_where_lower_is_better_a_score_may_not_rise() -> None:
    previous = evaluation(speed=False)
    row = first(previous)["tasks"]["rows"][0]
    row |= {"metric": "word_perplexity", "higher_is_better": False, "value": 12.0, "stderr": 0.1}
    report = copy.deepcopy(previous)
    first(report)["tasks"]["rows"][0]["value"] = 12.5
    assert failed(report, previous) == ["against-arc_easy-word_perplexity"]
    first(report)["tasks"]["rows"][0]["value"] = 11.5
    assert failed(report, previous) == []


@pytest.mark.parametrize(("better", "value"), [(True, 0.40), (False, 12.0)])
def test_a_score_without_a_standard_error_may_get_worse_by_five_percent(better: bool, value: float) -> None:
    previous = evaluation(speed=False)
    row = first(previous)["tasks"]["rows"][0]
    row |= {"metric": "f1", "higher_is_better": better, "value": value, "stderr": None}
    for share, expected in ((0.049, []), (0.051, ["against-arc_easy-f1"]), (-0.5, [])):
        report = copy.deepcopy(previous)
        first(report)["tasks"]["rows"][0]["value"] *= 1 - share if better else 1 + share
        assert failed(report, previous) == expected


def test_figures_that_are_gone_are_named() -> None:
    previous = evaluation()
    assert against.missing(evaluation(), previous) == []
    report = evaluation()
    del first(report)["tasks"]["rows"][0]
    assert against.missing(report, previous) == [
        "only the earlier report has figures for against-arc_easy-acc: they are not compared"
    ]
    (said,) = against.missing(evaluation(speed=False, tasks=False), previous)
    assert said.startswith("only the earlier report has figures for against-arc_easy-acc, against-hellaswag-acc, ")
    assert said.endswith(f" and {len(first(previous)['speed']['rows']) - 1} more: they are not compared")
    assert against.missing(previous, evaluation(speed=False, tasks=False)) == []


def test_a_single_byte_more_is_a_regression() -> None:
    previous = evaluation()
    report = copy.deepcopy(previous)
    first(report)["size"]["bytes"] -= 1
    assert failed(report, previous) == []
    first(report)["size"]["bytes"] += 2
    assert failed(report, previous) == ["against-size"]


@pytest.mark.parametrize(("spread", "allowed"), [(0.0, 0.05), (0.04, 2 * math.hypot(0.04, 0.04))])
def test_speed_may_fall_by_two_spreads_but_five_percent_anyway(spread: float, allowed: float) -> None:
    previous = evaluation(tasks=False)
    for row in first(previous)["speed"]["rows"]:
        row["spread"] = spread
    for share, count in ((0.99, 0), (1.01, 1)):
        report = copy.deepcopy(previous)
        first(report)["speed"]["rows"][2]["tokens_per_second"] *= 1 - share * allowed
        found = failed(report, previous)
        assert len(found) == count
        assert all("batch 4" in name for name in found)


def test_a_figure_that_is_not_finite_any_more_fails() -> None:
    previous = evaluation()
    report = copy.deepcopy(previous)
    first(report)["fidelity"]["kl"] |= {"mean": None, "stderr": None}
    first(report)["fidelity"]["perplexity"] |= {"increase": math.nan, "increase_stderr": math.nan}
    assert failed(report, previous) == ["against-perplexity-increase", "against-kl"]


def test_without_an_original_perplexity_itself_is_compared() -> None:
    previous = evaluation()
    previous["baseline"] = None
    first(previous)["fidelity"] |= {"kl": None, "agreement": None, "by_position": []}
    report = copy.deepcopy(previous)
    entries = against.regressions(report, previous)
    assert [entry["name"] for entry in entries][:2] == ["against-perplexity", "against-size"]
    perplexity = first(report)["fidelity"]["perplexity"]
    assert entries[0]["limit"] == pytest.approx(
        perplexity["compressed"] + 2 * math.sqrt(2) * perplexity["compressed_stderr"]
    )


def test_several_models_are_matched_by_name() -> None:
    previous = evaluation(("out/a", "out/b"))
    report = evaluation(("out/a", "out/b"))
    report["candidates"].reverse()
    report["candidates"][0]["size"]["bytes"] += 1
    assert failed(report, previous) == ["out/b: against-size"]
    report["candidates"][0]["name"] = "out/c"
    with pytest.raises(InputError, match="no model 'out/c'"):
        against.require_comparable(report, previous)


def test_a_single_model_may_be_called_something_else() -> None:
    assert failed(evaluation(("out/new",)), evaluation(("out/old",))) == []


def test_reports_of_quantize_are_compared_as_well() -> None:
    previous = samples.report()
    report = copy.deepcopy(previous)
    report["fidelity"]["kl"]["mean"] *= 2
    report["size"]["output_bytes"] += 1
    assert failed(report, previous) == ["against-kl", "against-size"]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("schema_version",), 2, "another schema"),
        (("command",), "quantize", "another command"),
        (("evaluation", "sha256"), "d" * 64, "another evaluation text"),
        (("evaluation", "windows"), 9, "another windows of text"),
        (("baseline", "weights_sha256"), "d" * 64, "another original"),
        (("baseline",), None, "another original"),
        (("baseline", "saved"), {"folder": "kept", "top_k": 64}, "'top 64 tokens' in the earlier report"),
        (("request", "tasks"), {"limit": 9, "num_fewshot": None}, "another --limit of tasks: 9 in the earlier report"),
        (("request", "tasks"), {"limit": 5, "num_fewshot": 2}, "another --num-fewshot of tasks: 2 in the earlier"),
        (("candidates", 0, "fidelity", "dtype"), "float32", "another precision"),
        (("candidates", 0, "speed", "machine", "device"), "another CPU", "speed was measured on 'another CPU'"),
    ],
)
def test_what_cannot_be_compared_is_refused(place: tuple[Any, ...], value: object, said: str) -> None:
    report, previous = evaluation(), evaluation()
    for each in (report, previous):
        each["request"]["tasks"] = {"limit": 5, "num_fewshot": None}
    inner: Any = previous
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if place == ("command",):
        previous = samples.report() | {"evaluation": previous["evaluation"]}
    against.require_comparable(report, report)
    with pytest.raises(InputError, match=said) as caught:
        against.require_comparable(report, previous)
    assert caught.value.hint


def test_a_single_window_has_no_noise_to_compare_with() -> None:
    report = evaluation()
    report["evaluation"] = report["evaluation"] | {"windows": 1}
    with pytest.raises(InputError, match="single window"):
        against.require_comparable(report, report)


def test_entries_read_like_gates() -> None:
    previous = evaluation()
    report = copy.deepcopy(previous)
    first(report)["size"]["bytes"] += 1_000_000
    said = [gates.describe(entry) for entry in against.regressions(report, previous)]
    assert "against-size: 5.54 MB, the limit is 4.54 MB" in said
    assert any(line.startswith("against-agreement: 95.50 %, the limit is 94.65 %") for line in said)
    assert any(line.startswith("against-kl: 0.003000, the limit is 0.00") for line in said)


def test_loading_an_earlier_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(evaluation()))
    assert against.load(path)["command"] == "evaluate"
    for text, said in (("{", "report.json"), ("{}", "no report of llmpare"), ("[]", "report.json")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            against.load(path)
    with pytest.raises(InputError, match=r"gone\.json"):
        against.load(tmp_path / "gone.json")
