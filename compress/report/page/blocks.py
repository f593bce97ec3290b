"""What happened inside the model: the error of every block and linear, their bits or sparsity, what was left alone."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.report.page import plots, words
from llmpare.compress.report.page.looks import Look
from llmpare.compress.report.page.parts import Cell, Figure, Item, Points, Section, Table

Report = Mapping[str, Any]
Measure = Callable[[Report], float | None]

FOLD = 12
"""Rows of a table above which it is folded away: the drawing above it says the same."""

WORST = 8


def sections(report: Report) -> list[Section]:
    blocks = report.get("blocks")
    if not blocks:
        return []
    items: list[Item] = [*_error(blocks), *_grids(blocks)]
    items += [_blocks(blocks), *_worst(blocks)]
    found = [Section("blocks", "Inside the model", items, LEAD)]
    if report.get("experts"):
        found.append(_experts(report["experts"]))
    if report.get("kept_dense"):
        found.append(Section("dense", "Left dense", [Points(_kept(report["kept_dense"]))]))
    return found


def _experts(experts: Report) -> Section:
    rows: list[list[Cell | str]] = []
    for mixture in experts["mixtures"]:
        counts = mixture["tokens"]
        short = ", ".join(f"{expert} ({counts[str(expert)]:,})" for expert in mixture["borrowed"])
        numbers = [f"{count:,}" for count in (len(counts), min(counts.values()), max(counts.values()))]
        rows.append([Cell(mixture["name"], "code"), *numbers, short or "none"])
    head = ("mixture", "experts", "fewest", "most", "borrowed, with their tokens")
    table = Table("Tokens that were routed to experts", head, rows, (1, 2, 3), folded=len(rows) > FOLD)
    lead = (
        "Experts with fewer tokens than inputs borrowed statistics from the others of their mixture: "
        f"{show.percent(experts['borrowed_share'])} of all compressed weights."
    )
    return Section("experts", "Experts", [table], lead)


LEAD = (
    "Relative error is the squared error of an output over the squared output. That of a block includes what all "
    "blocks before it lost; that of a linear is its own."
)


def _error(blocks: Sequence[Report]) -> list[Item]:
    known = [block for block in blocks if words.finite(block["relative_error"])]
    if len(known) < 2:
        return []
    xs, ys = [block["index"] for block in known], [block["relative_error"] for block in known]
    trace = plots.Trace("relative error", Look.of(0), xs, ys)
    drawing = plots.lines([trace], "blocks", x="block", y="relative error of the output", from_zero=True)
    worst = max(known, key=lambda block: block["relative_error"])
    says = (
        f"It begins at {show.figure(ys[0], 2)} and ends at {show.figure(ys[-1], 2)}; "
        f"the largest is {show.figure(worst['relative_error'], 2)}, in block {worst['index']}."
    )
    return [Figure("Error from block to block", drawing, says)]


def _grids(blocks: Sequence[Report]) -> list[Item]:
    found: list[Item] = []
    errors = _grid(blocks, lambda linear: linear.get("relative_error") or None)
    if errors is not None:
        kinds, values = errors
        present = [value for row in values for value in row if value is not None]
        low = math.log(min(present))
        span = math.log(max(present)) - low or 1.0
        drawing = plots.grid(
            kinds, values, "errors", strength=lambda value: (math.log(value) - low) / span,
            shown=lambda value: show.figure(value, 2), x="block",
        )  # fmt: skip
        says = (
            f"From {show.figure(min(present), 2)} to {show.figure(max(present), 2)}, "
            "the stronger the colour, the larger. Empty: left dense, or no error."
        )
        found.append(Figure("Error of each linear", drawing, says))
    bits = _grid(blocks, lambda linear: _bits(linear.get("scheme")))
    if bits is not None:
        kinds, values = bits
        present = sorted({value for row in values for value in row if value is not None})
        drawing = plots.grid(
            kinds, values, "bits", strength=lambda value: min(1.0, (value - 1) / 7), shown=_short, x="block",
            write=len(blocks) <= 16,
        )  # fmt: skip
        says = f"Bits per weight: {words.listed([_short(value) for value in present])}. Empty: left dense."
        found.append(Figure("Bits by linear", drawing, says))
    sparsity = _grid(blocks, _sparsity)
    if sparsity is not None:
        kinds, values = sparsity
        drawing = plots.grid(kinds, values, "sparsity", strength=lambda value: value, shown=plots.percent, x="block")
        found.append(Figure("Sparsity by linear", drawing, "The share of weights that are zero."))
    kept = _grid(blocks, _kept_units)
    if kept is not None:
        kinds, values = kept
        drawing = plots.grid(kinds, values, "kept", strength=lambda value: value, shown=plots.percent, x="block")
        found.append(Figure("What each linear kept", drawing, "The share of channels or groups of heads that stayed."))
    return found


def _grid(blocks: Sequence[Report], measure: Measure) -> tuple[list[str], list[list[float | None]]] | None:
    """The mean of a measure by kind of linear (rows) and block (columns); None where no linear has it."""
    found: dict[str, list[list[float]]] = {}
    for column, block in enumerate(blocks):
        for linear in block["linears"]:
            value = measure(linear)
            if value is not None and math.isfinite(value):
                cells = found.setdefault(_kind(linear["name"], block["index"]), [[] for _ in blocks])
                cells[column].append(value)
    if not found:
        return None
    kinds = sorted(found)
    return kinds, [[sum(cell) / len(cell) if cell else None for cell in found[kind]] for kind in kinds]


def _kind(name: str, index: int) -> str:
    """What a linear is called in every block: 'mlp.down_proj'; experts count as one."""
    inner = name.partition(f".{index}.")[2] or name
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inner)


def _sparsity(linear: Report) -> float | None:
    return linear["zeros"] / (linear["rows"] * linear["columns"]) if "zeros" in linear else None


def _kept_units(linear: Report) -> float | None:
    """The share of channels or groups of heads that a pruned linear still has."""
    return linear["kept_units"] / linear["units"] if linear.get("units") else None


def _left(linear: Report) -> str:
    """What a linear is now, in a few words."""
    if "units" in linear:
        return f"{linear['kept_units']:,} of {linear['units']:,} units"
    named = [str(linear["scheme"]), str(linear["method"])]
    return ", ".join([f"{show.percent(_sparsity(linear))} zeros", *named] if "zeros" in linear else named)


def _bits(scheme: str | None) -> float | None:
    found = re.match(r"[WwA-Za-z]*?(\d+)", scheme or "")
    return float(found[1]) if found else None


def _short(value: float) -> str:
    return f"{value:.3g}"


def _blocks(blocks: Sequence[Report]) -> Table:
    rows: list[list[Cell | str]] = [
        [
            str(block["index"]),
            words.ABSENT if block.get("removed") else show.figure(block["relative_error"], 3),
            _scheme(block),
            "resumed" if block["resumed"] else show.duration(block["seconds"]),
        ]
        for block in blocks
    ]
    return Table("Every block", ("block", "relative error", "scheme", "time"), rows, (1, 3), folded=len(rows) > FOLD)


def _scheme(block: Report) -> str:
    if block.get("removed"):
        return "removed"
    return ", ".join(sorted({str(linear.get("scheme", "dense")) for linear in block["linears"]})) or "dense"


def _worst(blocks: Sequence[Report]) -> list[Item]:
    linears = [linear for block in blocks for linear in block["linears"] if words.finite(linear.get("relative_error"))]
    if not linears:
        return []
    rows: list[list[Cell | str]] = [
        [
            Cell(linear["name"], "code"),
            f"{linear['rows']} × {linear['columns']}",
            _left(linear),
            show.figure(linear["relative_error"], 3),
        ]
        for linear in sorted(linears, key=lambda linear: -linear["relative_error"])[:WORST]
    ]
    caption = f"The {words.counted(len(rows), 'linear')} with the largest error of their own, of {len(linears)}"
    return [Table(caption, ("linear", "shape", "how", "relative error"), rows, (1, 3))]


def _kept(kept: Sequence[Report]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for linear in kept:
        reasons.setdefault(linear["why"], []).append(linear["name"])
    return [
        f"{why}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for why, names in reasons.items()
    ]
