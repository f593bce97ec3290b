"""The JSON Schema of report.json, version 1."""

import json
from importlib import resources
from typing import Any


def load() -> dict[str, Any]:
    """The schema shipped beside this file."""
    text = resources.files(__package__).joinpath("schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate(report: dict[str, Any]) -> list[str]:
    """What is wrong with a report, 'place: reason' each; empty when it keeps to the schema.

    For tests and for whoever reads our reports: needs the package jsonschema, which running llmpare does not.
    """
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(load()).iter_errors(report), key=lambda error: error.json_path)
    return [f"{error.json_path}: {error.message}" for error in errors]
