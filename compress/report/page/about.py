"""What the figures rest on: texts, cost, environment; and how to load the result."""

from collections.abc import Mapping
from typing import Any

from llmpare.compress.report import predictions, show
from llmpare.compress.report.page import words
from llmpare.compress.report.page.parts import Cell, Item, Section, Table
from llmpare.compress.report.subjects import baseline, subjects

Report = Mapping[str, Any]


def sections(report: Report) -> list[Section]:
    return [
        Section("text", "Text", [_texts(report)], _overlap(report)),
        Section("cost", "Cost", _cost(report["cost"]), _most(report["cost"])),
        Section("provenance", "Provenance", [_models(report), _environment(report)]),
    ]


def _texts(report: Report) -> Table:
    rows: list[list[Cell | str]] = [
        [
            part,
            Cell(str(source["dataset"]), "code"),
            f"{source['windows']:,} × {source['seqlen']:,}",
            Cell(source["sha256"][:16], "code"),
            Cell(source["first_line"], "quiet"),
        ]
        for part in ("calibration", "evaluation")
        if (source := report.get(part)) is not None
    ]
    head = ("part", "data set", "windows × tokens", "sha256", "begins with")
    return Table("The texts that were used", head, rows, (2,))


def _overlap(report: Report) -> str:
    overlap = report.get("overlap")
    if overlap is None:
        return ""
    return f"{show.percent(overlap)} of the evaluation text also occurs in the calibration text."


def _most(cost: Report) -> str:
    device = cost["peak_device_bytes"]
    on_device = "" if device is None else f" and {show.size(device)} on the device"
    return (
        f"{show.duration(cost['total_seconds'])} and at most {show.size(cost['peak_rss_bytes'])} of memory{on_device}."
    )


def _cost(cost: Report) -> list[Item]:
    rows = [[phase, show.duration(seconds)] for phase, seconds in cost["seconds"].items()]
    found = predictions.rows(cost)
    return [
        Table("Time by phase", ("phase", "time"), rows, (1,)),
        *([Table("What was predicted", ("what", *predictions.HEAD[1:]), found, (1, 2, 3))] if found else []),
    ]


def _models(report: Report) -> Table:
    rows: list[list[Cell | str]] = []
    sources = [("baseline" if "candidates" in report else "source", baseline(report))]
    sources += [("model", subject["source"]) for subject in subjects(report)]
    for part, source in sources:
        if source is not None:
            rows.append(
                [
                    Cell(str(source["model"]), "code", part),
                    str(source["architecture"]),
                    str(source.get("scheme", "dense")),
                    show.count(source["parameters"]),
                    Cell(source["weights_sha256"][:16], "code"),
                ]
            )
    head = ("model", "architecture", "stored as", "parameters", "sha256 of the weights")
    return Table("The models", head, rows, (3,))


def _environment(report: Report) -> Item:
    rows = [[name, Cell(str(value), "code")] for name, value in report["environment"].items()]
    return Table("The environment", ("what", "value"), rows)


def footer(report: Report) -> str:
    version = report["environment"]["llmpare"]
    return words.sentence(f"Written by llmpare {version}; all figures are in report.json")
