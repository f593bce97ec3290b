import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import samples
from jsonschema import Draft202012Validator

from llmpare.compress.report import build, schema
from llmpare.compress.request import Gates, LayerRule, QuantizeRequest, Scheme


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema.load())


def test_a_complete_report_keeps_to_it() -> None:
    assert schema.validate(samples.report()) == []


def test_a_report_full_of_nan_keeps_to_it_once_encoded() -> None:
    report = samples.report()
    for name in ("perplexity", "kl", "agreement"):
        report["fidelity"][name] = dict.fromkeys(report["fidelity"][name], math.nan)
    assert schema.validate(json.loads(build.encode(report))) == []


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all objects in a report."""
    here = [path] if isinstance(node, dict) else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return here + [place for key, item in items for place in _places(item, (*path, key))]


OPEN = {("calibration",), ("evaluation",), ("request", "options"), ("cost", "seconds")}


@pytest.mark.parametrize("place", _places(samples.report()), ids=lambda place: "/".join(map(str, place)) or "top")
def test_every_object_is_closed_and_complete(place: tuple[Any, ...]) -> None:
    """A name that is added or lost by accident breaks whoever reads the reports, so it must break this."""
    report = samples.report()
    target: Any = report
    for key in place:
        target = target[key]
    if place not in OPEN:
        target["surprise"] = "a text"
        assert schema.validate(report), "an unknown name is accepted"
        del target["surprise"]
    if place not in {("request", "options"), ("cost", "seconds")}:
        for name in [name for name in target if name != "rows" or "part" not in target]:
            kept = target.pop(name)
            assert schema.validate(report), f"{name} can be missing"
            target[name] = kept


def test_the_request_section_is_the_spec_of_a_request() -> None:
    rules = (LayerRule("lm_head", None), LayerRule("down", Scheme(8)))
    request = QuantizeRequest("m", Path("o"), options=(("damping", 0.01),), rules=rules)
    report = samples.report()
    report["request"] = json.loads(json.dumps(request.spec())) | {"model": request.model, "out": str(request.out)}
    assert schema.validate(report) == []


def test_every_gate_there_is_can_be_reported() -> None:
    named = schema.load()["properties"]["gates"]["items"]["properties"]["name"]["enum"]
    assert named == [field.name.replace("_", "-") for field in fields(Gates)]
