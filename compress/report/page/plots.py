"""Drawings of plain numbers. Each function returns inline SVG and knows nothing of reports."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llmpare.compress.report.page import svg
from llmpare.compress.report.page.looks import Look

Format = Callable[[float], str]


@dataclass(frozen=True)
class Trace:
    """The points of one line, or the dots of one model."""

    name: str
    look: Look
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Counts:
    """A histogram: len(edges) = len(counts) + 1, the first edge is 0."""

    name: str
    look: Look
    edges: Sequence[float]
    counts: Sequence[int]


@dataclass(frozen=True)
class Mark:
    """A value that is marked by a line of its own."""

    text: str
    value: float


def number(value: float) -> str:
    """A tick: '0.002', '10⁻⁵', '4,000'."""
    if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
        power = math.floor(math.log10(abs(value)) + 1e-9)
        factor = value / 10**power
        shown = "" if abs(factor - 1) < 1e-6 else f"{factor:g}·"
        return f"{shown}10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return f"{value:,.10g}"


def percent(value: float) -> str:
    return f"{100 * value:.6g} %"


def lines(
    traces: Sequence[Trace],
    name: str,
    *,
    x: str,
    y: str,
    x_format: Format = number,
    y_format: Format = number,
    log_x: bool = False,
    from_zero: bool = False,
    dots: bool = True,
) -> Markup:
    """Lines with a dot per point. log_x: for sizes that double. The y axis is logarithmic where it spans much."""

    def paint(axes: Axes) -> None:
        values = [value for trace in traces for value in trace.ys]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
            _log_ticks(axes.yaxis, y_format)
        elif from_zero:
            axes.set_ylim(0, 1.08 * max(values) or 1)
        for trace in traces:
            (line,) = axes.plot(trace.xs, trace.ys, color=trace.look.color, linestyle=trace.look.line, clip_on=False)
            svg.tip(line, trace.name)
            if dots:
                for px, py in zip(trace.xs, trace.ys, strict=True):
                    (dot,) = axes.plot(px, py, trace.look.marker, color=trace.look.color, clip_on=False)
                    svg.tip(dot, f"{trace.name}, {x} {x_format(px)}: {y_format(py)}")
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(_thinned(sorted({px for t in traces for px in t.xs}))))
            axes.xaxis.set_minor_locator(NullLocator())
        elif all(float(px).is_integer() for trace in traces for px in trace.xs):
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.xaxis.set_major_formatter(_ticks(x_format))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(_ticks(y_format))
        _name(axes, x, y)

    return svg.draw(paint, name)


def _thinned(ticks: Sequence[float], most: int = 8) -> Sequence[float]:
    step = -(-len(ticks) // most)
    return ticks[::-1][::step][::-1]


def ranges(
    traces: Sequence[tuple[Trace, Sequence[float]]], name: str, *, x: str, y: str, y_format: Format = number
) -> Markup:
    """A constant per range of x. traces: with the end of each range; xs are the starts."""

    def paint(axes: Axes) -> None:
        for trace, ends in traces:
            drawn = axes.stairs(
                trace.ys, [*trace.xs, ends[-1]], baseline=None, linewidth=2, color=trace.look.color, ls=trace.look.line
            )
            svg.tip(drawn, trace.name)
            for start, end, value in zip(trace.xs, ends, trace.ys, strict=True):
                # Nothing to see, but the pointer finds it.
                (spot,) = axes.plot([start, end], [value, value], color=trace.look.color, alpha=0, lw=12)
                svg.tip(spot, f"{trace.name}, positions {start:,.0f} to {end - 1:,.0f}: {y_format(value)}")
        axes.set_xlim(min(t.xs[0] for t, _ in traces), max(ends[-1] for _, ends in traces))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(_ticks(number))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_ticks(y_format))
        axes.margins(y=0.12)
        _name(axes, x, y)

    return svg.draw(paint, name)


def histogram(series: Sequence[Counts], name: str, *, x: str, y: str, marks: Sequence[Mark] = ()) -> Markup:
    """Shares of all counts over logarithmic bins; what lies in the first bin, from 0, is drawn as wide as the next."""

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        drawn: list[tuple[float, float]] = []
        for each in series:
            first, last = _filled(each.counts)
            edges = [_lowest(each.edges), *each.edges[1:]][first : last + 2]
            total = sum(each.counts)
            shares = [count / total for count in each.counts[first : last + 1]]
            drawn += [(edge, share) for edge, share in zip(edges, shares, strict=False)]
            if len(series) > 1:
                outline = axes.stairs(shares, edges, linewidth=2, color=each.look.color, ls=each.look.line)
                svg.tip(outline, each.name)
                drawn.append((edges[-1], 0))
                continue
            for low, high, share in zip(edges, edges[1:], shares, strict=False):
                (bar,) = axes.bar(low, share, width=high - low, align="edge", color=each.look.color, alpha=0.8)
                svg.tip(bar, f"{number(float(f'{low:.2g}'))} to {number(float(f'{high:.2g}'))}: {share:.1%}")
            drawn.append((edges[-1], 0))
        top = max(share for _, share in drawn)
        axes.set_ylim(0, 1.2 * top if marks else 1.08 * top)
        axes.set_xlim(min(edge for edge, _ in drawn), max(edge for edge, _ in drawn))
        for mark in marks:
            axes.axvline(mark.value, ymax=0.9, color=svg.color("ink"), linewidth=1, linestyle=(0, (3, 3)))
            axes.text(mark.value, 1.1 * top, mark.text, ha="center", va="bottom", fontsize=10)
        _log_ticks(axes.xaxis, number)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(_ticks(percent))
        _name(axes, x, y)

    return svg.draw(paint, name)


def _filled(counts: Sequence[int]) -> tuple[int, int]:
    """The first and the last bin with anything in it."""
    filled = [index for index, count in enumerate(counts) if count]
    return filled[0], filled[-1]


def _lowest(edges: Sequence[float]) -> float:
    """Where the first bin starts on a logarithmic axis, which has no 0."""
    return edges[1] ** 2 / edges[2]


def grid(
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    name: str,
    *,
    strength: Callable[[float], float],
    shown: Format,
    x: str,
    write: bool = False,
) -> Markup:
    """One cell per row and column, the stronger the colour the larger `strength` (0 to 1); None is left empty.

    values: [row][column]. shown: a value in the cell's tip and, with write, in the cell.
    """
    columns = len(values[0])

    def paint(axes: Axes) -> None:
        for r, row in enumerate(values):
            for c, value in enumerate(row):
                place = (c - 0.46, r - 0.46)
                if value is None:
                    axes.add_patch(Rectangle(place, 0.92, 0.92, facecolor="none", edgecolor=svg.color("rule"), lw=1))
                    continue
                fill = 0.12 + 0.88 * strength(value)
                cell = Rectangle(place, 0.92, 0.92, facecolor=svg.color("series-1"), alpha=fill)
                svg.tip(axes.add_patch(cell), f"{rows[r]}, {x} {c}: {shown(value)}")
                if write:
                    ink = svg.color("paper" if fill > 0.55 else "ink")
                    axes.text(c, r, shown(value), ha="center", va="center", fontsize=10, color=ink)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True) if columns > 1 else FixedLocator([0]))
        axes.xaxis.set_major_formatter(_ticks(number))
        axes.set_yticks(range(len(rows)), [svg.label(row) for row in rows])
        axes.set_xlabel(x)

    return svg.draw(paint, name, height=52 + 21 * len(rows))


def scatter(
    points: Sequence[Trace],
    name: str,
    *,
    x: str,
    y: str,
    x_format: Format = number,
    y_format: Format = number,
    limits: Sequence[Mark] = (),
) -> Markup:
    """One dot per model, both axes from 0. limits: along y."""

    def paint(axes: Axes) -> None:
        for point in points:
            (dot,) = axes.plot(
                point.xs,
                point.ys,
                point.look.marker,
                color=point.look.color,
                markersize=9,
                clip_on=False,
                zorder=3,
            )
            svg.tip(dot, f"{point.name}: {x_format(point.xs[0])}, {y_format(point.ys[0])}")
        lowest = min(0, *(point.ys[0] for point in points))
        highest = max(0, *(point.ys[0] for point in points))
        within = [limit for limit in limits if limit.value <= 2 * highest]
        highest = max([highest, *(limit.value for limit in within)])
        axes.set_xlim(0, 1.08 * max(point.xs[0] for point in points))
        axes.set_ylim(1.15 * lowest, 1.15 * highest or 1)
        for limit in within:
            axes.axhline(limit.value, color=svg.color("bad"), linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                svg.label(limit.text), (1, limit.value), (0, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", va="bottom", fontsize=10, color=svg.color("bad"),
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_ticks(lambda value: x_format(value) if value else "0"))
        axes.tick_params(axis="x", pad=7)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_ticks(y_format))
        _name(axes, x, y)

    return svg.draw(paint, name)


def dots(rows: Sequence[str], series: Sequence[Trace], name: str, *, x: str, x_format: Format = number) -> Markup:
    """One row per name, a dot per series: xs are values, ys the numbers of the rows they belong to; from 0."""

    def paint(axes: Axes) -> None:
        for trace in series:
            for value, row in zip(trace.xs, trace.ys, strict=True):
                (dot,) = axes.plot(value, row, trace.look.marker, color=trace.look.color, ms=7.5, clip_on=False)
                svg.tip(dot, f"{trace.name}, {rows[int(row)]}: {x_format(value)}")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.06 * max(value for trace in series for value in trace.xs) or 1)
        axes.set_yticks(range(len(rows)), [svg.label(row) for row in rows])
        axes.grid(True, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_ticks(x_format))
        axes.set_xlabel(x)

    return svg.draw(paint, name, height=58 + 24 * len(rows))


def _name(axes: Axes, x: str, y: str) -> None:
    """The x axis is named below, the y axis above its ticks, where it can be read without turning one's head."""
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", x=0, fontsize=11.5, color=svg.color("muted"), pad=8)


def _ticks(form: Format) -> FuncFormatter:
    return FuncFormatter(lambda value, _: form(value))


def _log_ticks(axis: Axis, form: Format) -> None:
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_ticks(form))
