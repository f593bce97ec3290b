"""report.md of a pruned model: what was removed or set to zero, what that saves, and what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import common, made, show
from llmpare.compress.report.marks import plain

Section = Mapping[str, Any]


def sections(report: Section) -> Sequence[list[str]]:
    """The sections of the page, in order. report: as schema.json says."""
    kind = _structure if "structure" in report else _mask
    how, rows, about = kind(report)
    return (
        made.headline(report, how, rows),
        about,
        common.gates(report["gates"]),
        common.concerns(report),
        _blocks(report["blocks"]),
        made.experts(report.get("experts")),
        made.kept_dense(report["kept_dense"]) if "mask" in report else [],
        made.texts(report),
        common.cost(report["cost"]),
        made.environment(report),
    )


def _mask(report: Section) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """How it was done, for the title; rows for the first table; what the mask saves."""
    request, mask, size = report["request"], report["mask"], report["size"]
    zeros = mask["pattern"] or f"{show.percent(request['sparsity'], 0)} zeros"
    then = "" if request["then"] is None else f" and {request['then']['bits']} bits for the rest"
    bits = size["linear_bits_per_weight"]
    rows = [
        (
            "zeros in the pruned linears",
            "",
            show.percent(mask["sparsity"], 2),
            f"{show.count(mask['zeros'])} of {show.count(mask['weights'])} weights",
        ),
        ("bits per weight of the pruned linears", "", "none" if bits is None else f"{bits:.3f}", ""),
    ]
    about = ["## What the mask saves", "", *(f"- {plain(line[0].upper() + line[1:])}." for line in mask["saved"])]
    return f"pruned by {request['method']}, {zeros}{then}", rows, about


def _structure(report: Section) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """The same for a model that was made smaller in shape."""
    structure = report["structure"]
    parameters, flops = structure["parameters"], structure["flops_per_token"]
    rows = [
        (
            "parameters",
            show.count(parameters["dense"]),
            show.count(parameters["kept"]),
            f"{show.percent(parameters['removed_share'])} removed",
        ),
        (
            "operations per token",
            show.count(flops["dense"]),
            show.count(flops["kept"]),
            show.percent(flops["kept"] / flops["dense"]) if flops["dense"] else "",
        ),
    ]
    if "experts" in structure:
        experts = structure["experts"]
        rows.append(("experts of every mixture", str(experts["dense"]), str(experts["kept"]), ""))
    healing = structure["healing"]
    about: list[str] = []
    if healing["needed"]:
        about = [
            "## What next",
            "",
            "So much was removed that training on a little text, with the original as the teacher, pays:",
            "",
            "```",
            healing["command"],
            "```",
        ]
    return "made smaller", rows, about


def _blocks(blocks: Sequence[Section]) -> list[str]:
    return made.blocks(
        blocks,
        "what is left",
        lambda block: "removed" if block.get("removed") else ", ".join(sorted({_left(n) for n in block["linears"]})),
        {
            "what is left": _left,
            "before": lambda linear: show.figure(linear["error_removed"], 3),
            "after": lambda linear: show.figure(linear["relative_error"], 3),
        },
        " before and after what stays makes up for what has left.",
    )


def _left(linear: Section) -> str:
    """What is left of a linear, in a few words."""
    if "zeros" in linear:
        zeros = show.percent(linear["zeros"] / (linear["rows"] * linear["columns"]), 1)
        return f"{zeros} zeros" + ("" if linear["scheme"] == "dense" else f", {linear['scheme']}")
    return f"{linear['kept_units']} of {linear['units']} units"
