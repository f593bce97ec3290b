"""What a pruned model lost of its weights, what that saves, and what to do next."""

from collections.abc import Mapping
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.report.page import words
from llmpare.compress.report.page.parts import Cell, Item, Points, Prose, Section, Table

Report = Mapping[str, Any]


def sections(report: Report) -> list[Section]:
    if "mask" in report:
        return [_mask(report["mask"], report["request"])]
    if "structure" in report:
        return [_structure(report["structure"])]
    return []


def _mask(mask: Report, request: Report) -> Section:
    rows: list[list[Cell | str]] = [
        ["zeros", f"{show.count(mask['zeros'])} of {show.count(mask['weights'])}", show.percent(mask["sparsity"], 2)],
        ["pattern", mask["pattern"] or "anywhere", f"{mask['allocation']} over the layers"],
    ]
    table = Table(f"Weights set to zero by {request['method']}", ("", "weights", "share"), rows, (1,))
    return Section("zeros", "What the zeros save", [table, Points([words.sentence(line) for line in mask["saved"]])])


def _structure(structure: Report) -> Section:
    rows = [
        [name, show.count(part["dense"]), show.count(part["kept"]), _share(part)]
        for name, part in (
            ("parameters", structure["parameters"]),
            ("operations per token", structure["flops_per_token"]),
        )
    ]
    items: list[Item] = [Table("Before and after", ("", "original", "now", "kept"), rows, (1, 2, 3))]
    if structure["healing"]["needed"]:
        says = "So much was removed that training on a little text, with the original as the teacher, pays:"
        items.append(Prose([says], structure["healing"]["command"]))
    return Section("structure", "What is left", items)


def _share(part: Report) -> str:
    return show.percent(part["kept"] / part["dense"]) if part["dense"] else ""
