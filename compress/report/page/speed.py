"""How fast the models are: latency and throughput over batch sizes and prompt lengths."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.report.page import plots, words
from llmpare.compress.report.page.looks import DASHES, ORIGINAL, Look
from llmpare.compress.report.page.parts import Cell, Figure, Item, Points, Prose, Section, Table
from llmpare.compress.report.subjects import baseline, subjects

Report = Mapping[str, Any]
Measure = Callable[[Report], float | None]


def sections(report: Report) -> list[Section]:
    """A line per model and engine; that of the baseline is drawn in grey."""
    judged = [(subject["name"], subject["speed"]) for subject in subjects(report)]
    original = baseline(report) or {}
    timed = [(name, speed) for name, speed in judged if (speed or {}).get("rows")]
    if not timed:
        return []
    if original.get("speed"):
        timed.append((f"{original['model']} (baseline)", original["speed"]))
    grey = bool(original.get("speed"))
    lines = _lines(timed, grey=grey)
    items: list[Item] = []
    for mode, x, name, y, measure in FIGURES:
        items += _figure(lines, mode, x, name, y, measure)
    items += _settings_figure(timed, grey=grey)
    items += [_table(name, speed, several=len(timed) > 1) for name, speed in timed]
    items += _skipped(timed)
    return [Section("speed", "Speed", items, _machine(timed[0][1]))]


def _throughput(row: Report) -> float | None:
    return float(row["tokens_per_second"])


def _median(latency: str) -> Measure:
    return lambda row: (row[latency] or {}).get("median")


FIGURES: Sequence[tuple[str, str, str, str, Measure]] = (
    ("decode", "batch", "Decoding throughput", "tokens per second", _throughput),
    ("decode", "batch", "Time per output token", "milliseconds, median", _median("tpot_ms")),
    ("prefill", "batch", "Prompt throughput", "tokens per second", _throughput),
    ("prefill", "prompt", "Time to first token", "milliseconds, median", _median("ttft_ms")),
)

Timed = tuple[str, Report]
"""A model's name and its section `speed`."""

Line = tuple[str, Look, Sequence[Report]]


def _lines(timed: Sequence[Timed], *, grey: bool) -> list[Line]:
    """The rows of each model and engine, each with the setting that was measured most often. grey: the last model."""
    found: list[Line] = []
    for place, (name, speed) in enumerate(timed):
        engines = list(dict.fromkeys(row["engine"] for row in speed["rows"]))
        for turn, engine in enumerate(engines):
            own = [row for row in speed["rows"] if row["engine"] == engine]
            usual = Counter(_setting(row) for row in own).most_common(1)[0][0]
            names = [name] * (len(timed) > 1) + [engine] * (len(engines) > 1 or len(timed) == 1)
            look = Look.of(len(found))
            if grey and place == len(timed) - 1:
                look = replace(ORIGINAL, dash=DASHES[turn % len(DASHES)])
            found.append((", ".join(names), look, [row for row in own if _setting(row) == usual]))
    return found


def _setting(row: Report) -> tuple[object, ...]:
    return row["cache"], row["compiled"], row["attention"]


def _figure(lines: Sequence[Line], mode: str, x: str, name: str, y: str, measure: Measure) -> list[Item]:
    """A drawing over x; of the other axis (prompt or batch) it shows the value with the most points."""
    other = "prompt" if x == "batch" else "batch"
    rows = [row for _, _, own in lines for row in own if row["mode"] == mode and words.finite(measure(row))]
    counts: dict[int, set[int]] = {}
    for row in rows:
        counts.setdefault(row[other], set()).add(row[x])
    if not counts:
        return []
    fixed = max(counts, key=lambda value: (len(counts[value]), -value))
    if len(counts[fixed]) < 2:
        return []
    traces = []
    for title, look, own in lines:
        points = sorted(
            (row[x], value)
            for row in own
            if row["mode"] == mode and row[other] == fixed and (value := measure(row)) is not None
        )
        if points:
            traces.append(plots.Trace(title, look, [px for px, _ in points], [py for _, py in points]))
    label = "batch size" if x == "batch" else "tokens in the prompt"
    drawing = plots.lines(traces, f"{mode}-{x}-{y.split()[0]}", x=label, y=y, log_x=True, from_zero=True)
    held = f"prompts of {fixed:,} tokens" if other == "prompt" else f"batches of {fixed:,}"
    first = traces[0]
    whose = f" ({first.name})" if len(traces) > 1 else ""
    says = (
        f"With {held}: {_rounded(first.ys[0])} {y.split(',')[0]} at {first.xs[0]:,}, "
        f"{_rounded(first.ys[-1])} at {first.xs[-1]:,}{whose}."
    )
    legend = [trace.look.legend(trace.name) for trace in traces] if len(traces) > 1 else []
    return [Figure(name, drawing, says, legend)]


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else show.figure(value, 3)


def _settings_figure(timed: Sequence[Timed], *, grey: bool) -> list[Item]:
    """Decoding throughput by setting, for the batch and prompt that most settings were measured with."""
    rows = [row for _, speed in timed for row in speed["rows"] if row["mode"] == "decode"]
    if not rows:
        return []
    groups: dict[tuple[int, int], set[str]] = {}
    for row in rows:
        groups.setdefault((row["batch"], row["prompt"]), set()).add(_settings(row))
    (batch, prompt), settings = max(groups.items(), key=lambda group: len(group[1]))
    if len(settings) < 2:
        return []
    names = sorted(settings)
    traces = []
    for place, (name, speed) in enumerate(timed):
        here = [row for row in speed["rows"] if row in rows and (row["batch"], row["prompt"]) == (batch, prompt)]
        if here:
            look = ORIGINAL if grey and place == len(timed) - 1 else Look.of(place)
            rates = [row["tokens_per_second"] for row in here]
            traces.append(plots.Trace(name, look, rates, [names.index(_settings(row)) for row in here]))
    drawing = plots.dots(names, traces, "settings", x="tokens per second")
    fastest = max(rows, key=lambda row: ((row["batch"], row["prompt"]) == (batch, prompt), row["tokens_per_second"]))
    says = f"Decoding, batch {batch:,}, prompts of {prompt:,} tokens. Fastest: {_settings(fastest)}."
    legend = [trace.look.legend(trace.name, dot=True) for trace in traces] if len(traces) > 1 else []
    return [Figure("Settings compared", drawing, says, legend)]


PHASES = {"prefill": "prompt", "decode": "decode"}


def _table(name: str, speed: Report, *, several: bool) -> Table:
    rows: list[list[Cell | str]] = []
    for row in speed["rows"]:
        latency = row["ttft_ms"] if row["mode"] == "prefill" else row["tpot_ms"]
        share = (row.get("roofline") or {}).get("compute_share" if row["mode"] == "prefill" else "bandwidth_share")
        rows.append(
            [
                Cell(PHASES.get(row["mode"], row["mode"]), note=_settings(row)),
                f"{row['batch']:,}",
                f"{row['prompt']:,}",
                words.ABSENT if latency is None else f"{show.figure(latency['median'], 3)} ms",
                words.ABSENT if latency is None else f"{show.figure(latency['p90'], 3)} ms",
                Cell(f"{row['tokens_per_second']:,.0f}", note=f"± {show.percent(row['spread'], 0)}"),
                words.ABSENT if row["peak_bytes"] is None else show.size(row["peak_bytes"]),
                words.ABSENT if share is None else show.percent(share, 0),
            ]
        )
    repeats = sorted({row["repeats"] for row in speed["rows"]})
    runs = f"{words.listed([f'{count:,}' for count in repeats])} runs each, after warming up"
    head = ("phase", "batch", "prompt", "median", "90 % below", "tokens/s", "memory", "of the peak")
    caption = f"Every measurement{' of ' + name if several else ''}, {runs}"
    return Table(caption, head, rows, range(1, len(head)), folded=len(rows) > 12)


def _settings(row: Report) -> str:
    return f"{row['engine']}, {show.setting(row)}"


def _machine(speed: Report) -> str:
    """What was timed on, and how the last column of the tables reads."""
    machine = speed["machine"]
    said = f"Timed on {machine['device']}."
    if machine["bandwidth_gb_s"] is not None and machine["gflops"] is not None:
        said += (
            f" Its peaks, measured at start, are {machine['bandwidth_gb_s']:,.0f} GB/s of memory bandwidth and "
            f"{machine['gflops']:,.0f} GFLOP/s; decoding is compared with the former, prompts with the latter."
        )
    held = {row.get("weights") for row in speed["rows"]} - {None, ""}
    if held:
        said += f" Weights in memory: {words.listed(sorted(held))}."
    return said


def _skipped(timed: Sequence[Timed]) -> list[Item]:
    said = dict.fromkeys(
        f"{each['engine']}, {each['what']}: {each['why']}" for _, speed in timed for each in speed["skipped"]
    )
    return [Prose(["Not measured:"]), Points(list(said))] if said else []
