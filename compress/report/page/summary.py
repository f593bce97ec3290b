"""The verdict, the headline figures, the gates: what a page begins with."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import gates, show
from llmpare.compress.report.page import plots, words
from llmpare.compress.report.page.looks import ORIGINAL, Look
from llmpare.compress.report.page.parts import Cell, Figure, Item, Page, Points, Section, Table, Tile, Tiles
from llmpare.compress.report.subjects import baseline, subjects, verdicts

Report = Mapping[str, Any]


def page(report: Report, sections: Sequence[Section], footer: str) -> Page:
    """The frame of the page around its sections."""
    return Page(
        eyebrow=eyebrow(report),
        title=title(report),
        passed=report["passed"],
        verdict="Passed" if report["passed"] else "Not passed",
        lead=lead(report),
        reasons=[] if report["passed"] else gates.reasons(report),
        sections=sections,
        footer=footer,
    )


def title(report: Report) -> str:
    """The models the page is about."""
    named = [subject["name"] for subject in subjects(report)]
    if len(named) > 1:
        return f"{words.counted(len(named), 'model')} compared"
    return str(named[0] if "candidates" in report else report["request"]["model"])


def eyebrow(report: Report) -> str:
    """The command in a few words."""
    request = report["request"]
    parts = [request["method"]] if "method" in request else []
    if "scheme" in request:
        scheme = request["scheme"]
        parts += [f"{scheme['bits']} bits", show.groups(scheme["group_size"])]
    if "sparsity" in request:
        parts.append(f"{show.percent(request['sparsity'], 0)} zeros")
    return " · ".join([report["command"], *([", ".join(parts)] if parts else [])])


def lead(report: Report) -> str:
    """The outcome in one sentence."""
    judged = subjects(report)
    if len(judged) == 1:
        return words.sentence(words.listed(_outcome(judged[0])))
    passed = sum(verdicts(report))
    against = baseline(report)
    compared = "" if against is None else f" compared with {against['model']}"
    return f"{words.counted(len(judged), 'model')}{compared}: {passed} passed, {len(judged) - passed} did not."


def _outcome(subject: Report) -> list[str]:
    size, fidelity = subject["size"], subject["fidelity"]
    phrases = []
    if size["ratio"] is not None:
        phrases.append(words.smaller(size["ratio"]))
    if fidelity.get("kl") is None:
        phrases.append(f"a perplexity of {show.figure(fidelity['perplexity']['compressed'])}")
    else:
        phrases.append(words.perplexity(fidelity["perplexity"]["increase"]))
        phrases.append(words.unchanged(fidelity["agreement"]["top1"]))
    return phrases


def sections(report: Report) -> list[Section]:
    """Headline figures, the comparison of several models, gates, concerns."""
    judged = subjects(report)
    found = []
    if len(judged) == 1:
        found.append(Section("figures", "In figures", [Tiles(_tiles(judged[0]))]))
    else:
        found.append(Section("comparison", "Compared", _comparison(report, judged)))
    if report["gates"]:
        found.append(Section("gates", "Gates", [_gates(report["gates"])]))
    return found + _concerns(report)


def _tiles(subject: Report) -> list[Tile]:
    size, fidelity = subject["size"], subject["fidelity"]
    bits = size["linear_bits_per_weight"]
    note = "" if bits is None else f"{bits:.2f} bits per weight in compressed linears"
    means, text = "on disk", show.size(size["bytes"])
    if size["ratio"] is not None:
        means = f"{words.smaller(size['ratio'])} than {show.size(size['baseline_bytes'])}"
        if size["ratio"] == 1 or 0.995 <= size["ratio"] <= 1.005:
            means = "as large as before"
    perplexity, kl = fidelity["perplexity"], fidelity.get("kl")
    tiles = [Tile("Size", text, means, note)]
    shown = show.with_error(perplexity["compressed"], perplexity["compressed_stderr"])
    if kl is None:
        return [*tiles, Tile("Perplexity", show.figure(perplexity["compressed"]), "without a baseline", shown)]
    agreement = fidelity["agreement"]
    before = show.figure(perplexity["dense"])
    return [
        *tiles,
        Tile(
            "Perplexity",
            words.change(perplexity["increase"]),
            words.perplexity(perplexity["increase"]),
            f"{before} before, {show.figure(perplexity['compressed'])} now",
        ),
        Tile(
            "KL divergence",
            show.figure(kl["mean"], 3),
            "nats per token; 0 is identical",
            f"standard error {show.figure(kl['stderr'], 2)}",
        ),
        Tile(
            "Same next token",
            show.percent(agreement["top1"]),
            words.one_in(agreement["top1"]),
            f"standard error {show.percent(agreement['stderr'], 2)}",
        ),
    ]


def _comparison(report: Report, judged: Sequence[Report]) -> list[Item]:
    against = baseline(report)
    head = ["model", "size", "perplexity"]
    if against is not None:
        head += ["change", "KL", "same next token"]
    head.append("gates")
    rows: list[list[Cell | str]] = []
    if against is not None:
        dense = judged[0]["fidelity"]["perplexity"]["dense"]
        named = Cell(against["model"], "code", "baseline")
        rows.append([named, show.size(against["weight_bytes"]), show.figure(dense), *[words.ABSENT] * 4])
    for subject, passed in zip(judged, verdicts(report), strict=True):
        size, fidelity = subject["size"], subject["fidelity"]
        perplexity = fidelity["perplexity"]
        ratio = "" if size["ratio"] is None else show.percent(size["ratio"])
        row: list[Cell | str] = [
            Cell(subject["name"], "code"),
            Cell(show.size(size["bytes"]), note=ratio),
            show.figure(perplexity["compressed"]),
        ]
        if against is not None:
            row += [
                words.change(perplexity["increase"]),
                show.with_error(fidelity["kl"]["mean"], fidelity["kl"]["stderr"], 3),
                words.share(fidelity["agreement"]["top1"], fidelity["agreement"]["stderr"]),
            ]
        rows.append([*row, Cell("passed", "good") if passed else Cell("failed", "bad")])
    numeric = tuple(range(1, len(head) - 1))
    table = Table("The models side by side; ± is a standard error", head, rows, numeric)
    return [table, *_size_against_accuracy(report, judged, against)]


def _size_against_accuracy(report: Report, judged: Sequence[Report], against: Report | None) -> list[Item]:
    """Two drawings with a dot per model, or none where nothing can be drawn."""
    measures = [("perplexity", "Size against perplexity", lambda f: f["perplexity"]["compressed"], plots.number)]
    if against is not None:
        measures = [
            ("KL, nats per token", "Size against KL divergence", lambda f: f["kl"]["mean"], plots.number),
            ("increase of perplexity", "Size against perplexity", lambda f: f["perplexity"]["increase"], plots.percent),
        ]
    figures: list[Item] = []
    for place, (y, name, value, form) in enumerate(measures):
        points, legend = [], []
        for index, subject in enumerate(judged):
            measured = value(subject["fidelity"])
            if words.finite(measured):
                look = Look.of(index)
                points.append(plots.Trace(subject["name"], look, [subject["size"]["bytes"]], [measured]))
                legend.append(look.legend(subject["name"], dot=True))
        if not points:
            continue
        if against is not None:
            look = ORIGINAL
            points.append(plots.Trace(against["model"], look, [against["weight_bytes"]], [0.0]))
            legend.append(look.legend(f"{against['model']} (baseline)", dot=True))
        best = min(points, key=lambda point: point.ys[0] if point.look.role != "muted" else float("inf"))
        drawing = plots.scatter(
            points,
            f"size-{place}",
            x="size on disk",
            y=y,
            x_format=show.size,
            y_format=form,
            limits=_limits(report, place),
        )
        says = f"Lower and further left is better. Of the models compared, {best.name} is the closest."
        figures.append(Figure(name, drawing, says, legend))
    return figures


def _limits(report: Report, place: int) -> list[plots.Mark]:
    """The gate that bounds the y axis of a drawing, once."""
    name = ("max-kl", "max-perplexity-increase")[place]
    found = {gate["limit"]: gates.figures(gate)[1] for gate in report["gates"] if gate["name"].endswith(name)}
    return [plots.Mark(f"limit {text}", limit) for limit, text in sorted(found.items())]


def _gates(entries: Sequence[Report]) -> Table:
    """What failed comes first."""
    rows: list[list[Cell | str]] = []
    for gate in sorted(entries, key=lambda gate: gate["passed"]):
        value, limit = gates.figures(gate)
        verdict = Cell("passed", "good") if gate["passed"] else Cell("failed", "bad")
        rows.append([Cell(gate["name"], "code"), value, limit, verdict])
    return Table("What was demanded and what was measured", ("gate", "measured", "limit", "verdict"), rows, (1, 2))


def _concerns(report: Report) -> list[Section]:
    found = []
    if report["warnings"]:
        points = [words.sentence(warning) for warning in report["warnings"]]
        found.append(Section("warnings", "Warnings", [Points(points, "bad")]))
    if report["fallbacks"]:
        rows: list[list[Cell | str]] = [
            [Cell(each["name"], "code"), each["cause"], each["action"]] for each in report["fallbacks"]
        ]
        caption = "Where something simpler was done than was asked for"
        table = Table(caption, ("where", "why", "what was done"), rows, folded=len(rows) > 8)
        found.append(Section("fallbacks", "Fallbacks", [table]))
    return found
