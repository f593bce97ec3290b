import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import evaluations
import pytest
import samples
from jsonschema import Draft202012Validator

from llmpare.compress.evaluate.request import EvaluateRequest, SpeedRequest, TasksRequest
from llmpare.compress.report import build, schema
from llmpare.compress.request import Gates, LayerRule, QuantizeRequest, Scheme


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema.load())


def test_a_complete_report_keeps_to_it() -> None:
    assert schema.validate(samples.report()) == []


def test_a_report_full_of_nan_keeps_to_it_once_encoded() -> None:
    report = samples.report()
    for name in ("perplexity", "kl", "agreement"):
        figures = {key: math.nan for key, value in report["fidelity"][name].items() if isinstance(value, float)}
        report["fidelity"][name] |= figures
    assert schema.validate(json.loads(build.encode(report))) == []


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all objects in a report."""
    here = [path] if isinstance(node, dict) else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return here + [place for key, item in items for place in _places(item, (*path, key))]


OPEN = {("calibration",), ("evaluation",), ("request", "options"), ("cost", "seconds")}
REPORTS = {"quantize": samples.report, "evaluate": evaluations.evaluation}
ADDED = ("rows", "ids_sha256", "scored_bytes")  # by one source of text or another
FOREIGN = ("tasks", "speed")  # whoever measures these may add to them


@pytest.mark.parametrize(
    ("command", "place"),
    [(command, place) for command, report in REPORTS.items() for place in _places(report())],
    ids=lambda part: part if isinstance(part, str) else "/".join(map(str, part)) or "top",
)
def test_every_object_is_closed_and_complete(command: str, place: tuple[Any, ...]) -> None:
    """A name that is added or lost by accident breaks whoever reads the reports, so it must break this."""
    report = REPORTS[command]()
    target: Any = report
    for key in place:
        target = target[key]
    if place not in OPEN and not set(FOREIGN) & set(place):
        target["surprise"] = "a text"
        assert schema.validate(report), "an unknown name is accepted"
        del target["surprise"]
    if place not in {("request", "options"), ("cost", "seconds")}:
        for name in [name for name in target if "part" not in target or name not in ADDED]:
            kept = target.pop(name)
            assert schema.validate(report), f"{name} can be missing"
            target[name] = kept


def test_the_request_section_is_the_spec_of_a_request() -> None:
    rules = (LayerRule("lm_head", None), LayerRule("down", Scheme(8)))
    request = QuantizeRequest("m", Path("o"), options=(("damping", 0.01),), rules=rules)
    report = samples.report()
    report["request"] = json.loads(json.dumps(request.spec())) | {"model": request.model, "out": str(request.out)}
    assert schema.validate(report) == []


def test_the_request_section_of_an_evaluation_is_its_spec() -> None:
    tasks, speed = TasksRequest(("arc_easy",), include=Path("tasks")), SpeedRequest(batch_sizes=(1, 2))
    request = EvaluateRequest(("a", "b"), "c", Path("out"), tasks=tasks, speed=speed, junit=Path("gates.xml"))
    report = evaluations.evaluation()
    report["request"] = json.loads(json.dumps(request.spec()))
    assert schema.validate(report) == []


@pytest.mark.parametrize("prefix", ["", "out/w4: "])
def test_every_gate_there_is_can_be_reported(prefix: str) -> None:
    report = evaluations.evaluation()
    names = [field.name.replace("_", "-") for field in fields(Gates)]
    gate = {"limit": 1.0, "value": 2.0, "passed": False}
    report["gates"] = [{"name": f"{prefix}{name}", **gate} for name in (*names, "against-kl")]
    assert schema.validate(report) == []
    report["gates"].append({"name": f"{prefix}max-surprise", **gate})
    assert len(schema.validate(report)) == 1


def test_an_evaluation_without_a_baseline() -> None:
    report = evaluations.evaluation(speed=False, tasks=False)
    report["baseline"] = None
    candidate = report["candidates"][0]
    candidate["size"] |= {"baseline_bytes": None, "ratio": None}
    candidate["fidelity"] |= {"kl": None, "agreement": None, "by_position": []}
    assert schema.validate(report) == []


def test_a_report_of_another_command_is_none() -> None:
    report = samples.report() | {"command": "conjure"}
    assert schema.validate(report)
