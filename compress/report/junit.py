"""JUnit XML, which GitLab, Jenkins and GitHub's test reporters show: a suite per model, a case per gate."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from llmpare.compress.report import gates, show
from llmpare.compress.report.subjects import gates_of, subjects

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The document, ending with a newline. report: as schema.json says, of any command, fresh or read back.

    Every model has a case 'measured', which fails when its figures are not finite; then comes one for each part that
    could not be measured, and one per gate. What concerns no single model, such as --strict, stands in a suite of its
    own. Seconds are those of the whole run.
    """
    root = Element("testsuites", name=f"llmpare {report['command']}")
    own, failed = gates_of(report), report.get("failures", [])
    elsewhere = [each for each in failed if report["baseline"] and each["model"] == report["baseline"]["model"]]
    for subject in subjects(report):
        suite = SubElement(root, "testsuite", name=_clean(subject["name"]))
        _properties(suite, report, subject)
        failure = None if gates.measurable(subject["fidelity"]) else "the perplexity is not finite"
        _case(suite, subject["name"], "measured", failure)
        for each in failed:
            if each["model"] == subject["source"]["model"]:
                _case(suite, subject["name"], each["part"], each["why"])
        for name, gate in own[subject["name"]]:
            _case(suite, subject["name"], name, None if gate["passed"] else gates.describe(gate))
    if own[""] or elsewhere or _strict(root, report):
        suite = SubElement(root, "testsuite", name="run")
        for each in elsewhere:
            _case(suite, "run", f"{each['part']} of the baseline", each["why"])
        for name, gate in own[""]:
            _case(suite, "run", name, None if gate["passed"] else gates.describe(gate))
        if _strict(root, report):
            _case(suite, "run", "strict", "\n".join(gates.reasons(report)))
    for suite in root:
        cases = suite.findall("testcase")
        failed = sum(case.find("failure") is not None for case in cases)
        suite.attrib.update({"tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": "0"})
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.attrib[name]) for suite in root)))
    root.set("time", f"{report['cost']['total_seconds']:.3f}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _strict(root: Element, report: Report) -> bool:
    """Whether nothing that has a case explains why the run did not pass."""
    return not report["passed"] and not any(case.find("failure") is not None for case in root.iter("testcase"))


def _case(suite: Element, model: str, name: str, failure: str | None) -> None:
    case = SubElement(suite, "testcase", classname=_clean(model), name=_clean(name), time="0")
    if failure is not None:
        message = _clean(failure)
        SubElement(case, "failure", message=message, type="gate").text = message


def _properties(suite: Element, report: Report, subject: Report) -> None:
    fidelity, size = subject["fidelity"], subject["size"]
    values = {
        "perplexity": fidelity["perplexity"]["compressed"],
        "perplexity increase": fidelity["perplexity"]["increase"],
        "KL": (fidelity["kl"] or {}).get("mean"),
        "agreement": (fidelity["agreement"] or {}).get("top1"),
        "bytes": size["bytes"],
        "evaluation text sha256": report["evaluation"]["sha256"],
        "llmpare": report["environment"]["llmpare"],
    }
    properties = SubElement(suite, "properties")
    for name, value in values.items():
        if value is not None:
            SubElement(properties, "property", name=name, value=_clean(str(value)))


def _clean(text: str) -> str:
    """text without what XML cannot hold, such as control codes, which are shown as escapes."""
    return "\n".join(show.printable(line) for line in text.split("\n"))
