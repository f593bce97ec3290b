"""How a student learned: its models, its training, its curve."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.report.page import plots, words
from llmpare.compress.report.page.looks import Look
from llmpare.compress.report.page.parts import Cell, Figure, Item, Section, Table

Report = Mapping[str, Any]


def sections(report: Report) -> list[Section]:
    if "distillation" not in report:
        return []
    found = report["distillation"]
    items: list[Item] = [_gained(report), _training(report)]
    curve = [point for point in found["curve"] if words.finite(point["loss"])]
    if curve:
        trace = plots.Trace("loss", Look.of(0), [p["step"] for p in curve], [p["loss"] for p in curve])
        drawing = plots.lines([trace], "training-loss", x="step", y="loss, nats per token", dots=len(curve) < 40)
        first, last = show.figure(curve[0]["loss"]), show.figure(curve[-1]["loss"])
        items.append(Figure("Loss while training", drawing, f"From {first} at the first step to {last} at the last."))
    if found["early_exits"]:
        items.append(_exits(found["early_exits"]))
    return [Section("training", "What was learned", items)]


def _exits(exits: Sequence[Report]) -> Table:
    rows: list[list[Cell | str]] = [
        [
            str(each["exit"]),
            show.percent(each["acceptance"], 1),
            show.figure(each["plain_tokens_per_second"]),
            show.figure(each["drafted_tokens_per_second"]),
            f"{each['speedup']:.2f}",
            show.percent(each["equal"], 0),
        ]
        for each in exits
    ]
    head = ("blocks", "drafts accepted", "tokens per second", "with drafts", "times as fast", "same text")
    return Table("Drafting with the first blocks, checking with all", head, rows, (1, 2, 3, 4, 5))


def _gained(report: Report) -> Table:
    before, after = report["distillation"]["before"], report["fidelity"]
    rows: list[list[Cell | str]] = [
        [
            "perplexity",
            *(show.figure(each["perplexity"]["compressed"]) for each in (before, after)),
            show.figure(after["perplexity"]["dense"]),
        ],
        ["KL divergence, nats per token", *(show.figure(each["kl"]["mean"]) for each in (before, after)), "0"],
        ["same next token", *(show.percent(each["agreement"]["top1"], 2) for each in (before, after)), "100 %"],
    ]
    return Table("The student on text that nobody learned from", ("", "before", "now", "teacher"), rows, (1, 2, 3))


def _training(report: Report) -> Table:
    found = report["distillation"]
    training, student = found["training"], found["student"]
    rows: list[list[Cell | str]] = [
        [
            "teacher",
            Cell(report["source"]["model"], "code"),
            f"{show.count(report['source']['parameters'])} parameters",
        ],
        [
            "student",
            Cell(student["model"], "code"),
            f"{show.count(student['parameters'])} parameters, {student['made']}",
        ],
        ["tokens", f"{training['tokens']:,}", f"the text {training['epochs']:.2f} times"],
        ["steps", f"{training['steps']:,}", f"of {training['windows_per_step']} windows of {training['seqlen']}"],
        ["loss", training["loss"], f"learned from {training['learned_from']}"],
        ["learning rate", f"{training['rate']:.2g}", f"after {words.counted(training['warmup'], 'step')}"],
        ["time", show.duration(training["seconds"]), f"{show.figure(training['tokens_per_second'])} tokens per second"],
    ]
    return Table("The training", ("", "", ""), rows)
