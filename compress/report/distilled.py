"""report.md of a distilled model: what was learned from what, for how many tokens, at what cost, to what end."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import common, made, show
from llmpare.compress.report.marks import code, table

Section = Mapping[str, Any]
POINTS = 10  # of the curve


def sections(report: Section) -> Sequence[list[str]]:
    """The sections of the page, in order. report: as schema.json says."""
    found = report["distillation"]
    training = found["training"]
    return (
        made.headline(report, f"distilled from {training['learned_from']}", _before(found)),
        _training(report),
        common.gates(report["gates"]),
        common.concerns(report),
        _curve(found["curve"]),
        _exits(found["early_exits"]),
        made.texts(report),
        common.cost(report["cost"]),
        made.environment(report),
    )


def summary(found: Section) -> str:
    """What the training brought back, in a few words of plain ASCII."""
    before = show.figure(found["before"]["perplexity"]["compressed"])
    back = "" if found["recovered"] is None else f", {show.percent(found['recovered'], 1)} of the loss recovered"
    return f"perplexity {before} before the training{back}"


def _before(found: Section) -> list[tuple[str, ...]]:
    before = found["before"]
    return [
        (
            "perplexity before the training",
            "",
            show.figure(before["perplexity"]["compressed"]),
            "" if found["recovered"] is None else f"{show.percent(found['recovered'], 1)} of the loss recovered",
        ),
        ("KL divergence before the training", "", show.figure(before["kl"]["mean"]), ""),
        *_quantized(found["quantized_without_training"]),
    ]


def _quantized(rounded: Section | None) -> list[tuple[str, ...]]:
    """The same format without training."""
    if rounded is None:
        return []
    kl = f"KL divergence {show.figure(rounded['kl']['mean'])}"
    return [("perplexity quantized without training", "", show.figure(rounded["perplexity"]["compressed"]), kl)]


def _training(report: Section) -> list[str]:
    found = report["distillation"]
    training, student = found["training"], found["student"]
    speed = training["tokens_per_second"]
    rows = [
        ("teacher", code(report["source"]["model"]), f"{show.count(report['source']['parameters'])} parameters"),
        ("student", code(student["model"]), f"{show.count(student['parameters'])} parameters, {student['made']}"),
        (
            "tokens",
            f"{training['tokens']:,}",
            f"the text {training['epochs']:.2f} times" if training["epochs"] > 1 else "each once",
        ),
        (
            "steps",
            f"{training['steps']:,}",
            f"of {training['windows_per_step']} windows of {training['seqlen']}, in {training['processes']} processes",
        ),
        ("loss", training["loss"], f"learned from {training['learned_from']}"),
        ("learning rate", f"{training['rate']:.2g}", f"after {training['warmup']} steps, then falling to 0"),
        (
            "time",
            show.duration(training["seconds"]),
            "" if speed is None else f"{show.figure(speed)} tokens per second",
        ),
    ]
    return ["## Training", "", *table(("", "", ""), rows)]


def _exits(exits: Sequence[Section]) -> list[str]:
    """What drafting with the first blocks brings."""
    if not exits:
        return []
    rows = [
        (
            str(each["exit"]),
            show.percent(each["acceptance"], 1),
            show.figure(each["tokens_per_check"], 3),
            f"{show.figure(each['plain_tokens_per_second'])} → {show.figure(each['drafted_tokens_per_second'])}",
            f"{each['speedup']:.2f}",
            show.percent(each["equal"], 0),
        )
        for each in exits
    ]
    drafting = exits[0]["generation_config"]
    head = ("blocks", "drafts accepted", "tokens per check", "tokens per second", "times as fast", "same text")
    return [
        "## Early exits",
        "",
        "Greedy generation by `generate(assistant_early_exit=blocks)` of transformers, against that by all blocks.",
        f"A draft ends after {drafting['num_assistant_tokens']} tokens, or with one that the exit gives less than "
        f"{drafting['assistant_confidence_threshold']:g}, as `generation_config.json` now says.",
        "",
        *table(head, rows, right="012345"),
    ]


def _curve(curve: Sequence[Section]) -> list[str]:
    """Some points of it; report.html draws all."""
    if not curve:
        return []
    places = sorted({round(index * (len(curve) - 1) / (POINTS - 1)) for index in range(POINTS)})
    rows = [(f"{curve[p]['step']:,}", show.figure(curve[p]["loss"]), f"{curve[p]['rate']:.2g}") for p in places]
    return ["## Curve", "", *table(("step", "loss", "learning rate"), rows, right="012")]
