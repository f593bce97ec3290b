"""The models that a report judges, in one form whatever command wrote it: that of evaluate's `candidates`."""

from collections.abc import Mapping, Sequence
from typing import Any

Section = Mapping[str, Any]


def subjects(report: Section) -> Sequence[Section]:
    """One mapping per judged model: name, source, size, fidelity, domains, worst, tasks, speed, gates, passed.

    `evaluate` reports its candidates in this form; a command that makes one model has these sections at its top.
    """
    if "candidates" in report:
        candidates: Sequence[Section] = report["candidates"]
        return candidates
    size = report["size"]
    return [
        {
            "name": report["request"]["out"],
            "source": None,
            "size": {
                "bytes": size["output_bytes"],
                "baseline_bytes": size["source_bytes"],
                "ratio": size["ratio"],
                "linear_bits_per_weight": size.get("linear_bits_per_weight"),
                "parameters": size.get("parameters_output", size["parameters_total"]),
            },
            "fidelity": report["fidelity"],
            "domains": report.get("domains") or [],
            "worst": report.get("worst") or [],
            "tasks": report.get("tasks"),
            "speed": report.get("speed"),
            "gates": report["gates"],
            "passed": report["passed"],
        }
    ]


def baseline(report: Section) -> Section | None:
    """What the models are compared with: model, weight_bytes, weights_sha256; None when there is nothing."""
    if "candidates" in report:
        given: Section | None = report["baseline"]
        return given
    source = report["source"]
    return {**source, "weight_bytes": source["bytes"]}


def gates_of(report: Section) -> dict[str, list[tuple[str, Section]]]:
    """For every model its gates, each with its name less that of the model; '' has those of no single model."""
    names = [subject["name"] for subject in subjects(report)]
    found: dict[str, list[tuple[str, Section]]] = {name: [] for name in ("", *names)}
    for gate in report["gates"]:
        if len(names) == 1:
            found[names[0]].append((gate["name"], gate))
            continue
        owner = max((name for name in names if gate["name"].startswith(f"{name}: ")), key=len, default="")
        found[owner].append((gate["name"].removeprefix(f"{owner}: ") if owner else gate["name"], gate))
    return found


def verdicts(report: Section) -> list[bool]:
    """For every model whether it passed by itself and holds every gate of the run that is its own."""
    gates = gates_of(report)
    return [
        subject["passed"] and all(gate["passed"] for _, gate in gates[subject["name"]]) for subject in subjects(report)
    ]
