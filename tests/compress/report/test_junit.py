from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import samples
from evaluations import evaluation

from llmpare.compress.report import junit


def parsed(report: dict[str, Any]) -> Element:
    text = junit.render(report)
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    assert text.endswith("\n")
    root = ElementTree.fromstring(text.encode())
    for suite in root:
        cases = suite.findall("testcase")
        assert suite.attrib["tests"] == str(len(cases))
        assert suite.attrib["failures"] == str(len(suite.findall("testcase/failure")))
    assert root.attrib["tests"] == str(len(root.findall("testsuite/testcase")))
    assert root.attrib["failures"] == str(len(root.findall("testsuite/testcase/failure")))
    return root


def failures(root: Element) -> dict[tuple[str, str], str]:
    return {
        (suite.attrib["name"], case.attrib["name"]): failure.attrib["message"]
        for suite in root
        for case in suite.findall("testcase")
        for failure in case.findall("failure")
    }


def cases(root: Element) -> list[tuple[str, str]]:
    return [(suite.attrib["name"], case.attrib["name"]) for suite in root for case in suite.findall("testcase")]


def test_a_run_that_passed() -> None:
    root = parsed(samples.report())
    assert cases(root) == [("out/w4", "measured"), ("out/w4", "max-kl")]
    assert failures(root) == {}
    assert root.attrib["time"] == "7.900"
    values = {each.attrib["name"]: each.attrib["value"] for each in root.iter("property")}
    assert values["KL"] == "0.00286"
    assert values["bytes"] == "4537000"


def test_every_model_has_a_case_per_gate_and_failures_give_value_and_limit() -> None:
    report = evaluation(("out/a", "out/b"))
    report["passed"] = False
    report["gates"] = [
        {"name": "out/a: max-kl", "limit": 0.005, "value": 0.003, "passed": True},
        {"name": "out/b: max-kl", "limit": 0.005, "value": 0.006, "passed": False},
        {"name": "out/b: against-size", "limit": 3_210_000, "value": 3_937_504, "passed": False},
    ]
    root = parsed(report)
    assert cases(root) == [
        ("out/a", "measured"), ("out/a", "max-kl"),
        ("out/b", "measured"), ("out/b", "max-kl"), ("out/b", "against-size"),
    ]  # fmt: skip
    assert failures(root) == {
        ("out/b", "max-kl"): "out/b: max-kl: 0.006000, the limit is 0.005",
        ("out/b", "against-size"): "out/b: against-size: 3.94 MB, the limit is 3.21 MB",
    }


def test_a_model_whose_name_begins_like_another() -> None:
    report = evaluation(("out", "out: b"))
    report["gates"] = [{"name": "out: b: max-kl", "limit": 0.005, "value": 0.003, "passed": True}]
    assert cases(parsed(report)) == [("out", "measured"), ("out: b", "measured"), ("out: b", "max-kl")]


def test_figures_that_are_not_finite_fail_without_any_gate() -> None:
    report = samples.report() | {"gates": [], "passed": False}
    report["fidelity"]["perplexity"]["compressed"] = None
    assert list(failures(parsed(report))) == [("out/w4", "measured")]


def test_strict_has_a_case_of_its_own() -> None:
    root = parsed(samples.report() | {"passed": False})
    assert failures(root) == {("run", "strict"): "--strict: 1 fallback and 1 warning"}


@pytest.mark.parametrize("name", ["\x1b[2J<&\"'>\n]]>", "\ud800", "\x00"])
def test_any_name_gives_a_document_that_can_be_read(name: str) -> None:
    report = evaluation((name, "b"))
    report["gates"] = [{"name": f"{name}: max-kl", "limit": 0.001, "value": 0.003, "passed": False}]
    report["passed"] = False
    root = parsed(report)
    assert [case for _, case in cases(root)] == ["measured", "max-kl", "measured"]
    assert len(failures(root)) == 1


def test_the_same_report_gives_the_same_bytes() -> None:
    assert junit.render(evaluation()) == junit.render(evaluation())
