"""How the models predict: fidelity to the baseline, by position and domain, in the worst contexts, on tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.report.page import plots, words
from llmpare.compress.report.page.looks import Look
from llmpare.compress.report.page.parts import Cell, Figure, Item, Legend, Quote, Quotes, Section, Table
from llmpare.compress.report.subjects import subjects

Report = Mapping[str, Any]

CONTEXT = 240
"""Characters of a context that are shown: its end, where the models part."""


def sections(report: Report) -> list[Section]:
    judged = subjects(report)
    found = [Section("accuracy", "Accuracy", [*_fidelity(judged), *_figures(judged)], _measured(report, judged))]
    if domains := _domains(judged):
        found.append(Section("domains", "By domain", domains, "The same measures on texts of one kind each."))
    if tasks := _tasks(judged):
        found.append(Section("tasks", "Tasks", tasks, "Questions with a known answer, scored as the field does."))
    if worst := [_worst(subject, several=len(judged) > 1) for subject in judged if subject["worst"]]:
        says = "The places in the text where a model departs most from the original, the worst first."
        found.append(Section("worst", "Where it breaks", worst, says))
    return found


def _measured(report: Report, judged: Sequence[Report]) -> str:
    fidelity = judged[0]["fidelity"]
    precision = fidelity["dtype"].removeprefix("torch.")
    text = str(report["evaluation"]["dataset"])
    return (
        f"Measured on {words.counted(fidelity['tokens'], 'token')} in {words.counted(fidelity['windows'], 'window')} "
        f"of text ({text}), in {precision}. After ± stands one standard error, over windows."
    )


def _fidelity(judged: Sequence[Report]) -> list[Item]:
    head = ["model", "perplexity", "change"]
    with_bytes = all(words.finite((each["fidelity"].get("bits_per_byte") or {}).get("compressed")) for each in judged)
    if with_bytes:
        head.append("bits per byte")
    rows: list[list[Cell | str]] = []
    first = judged[0]["fidelity"]
    compared = [subject for subject in judged if subject["fidelity"].get("kl") is not None]
    if compared:
        dense = first["perplexity"]
        row: list[Cell | str] = ["original", show.with_error(dense["dense"], dense["dense_stderr"]), words.ABSENT]
        rows.append([*row, *([show.figure(first["bits_per_byte"]["dense"])] if with_bytes else [])])
    for subject in judged:
        fidelity = subject["fidelity"]
        perplexity = fidelity["perplexity"]
        row = [_model(subject), show.with_error(perplexity["compressed"], perplexity["compressed_stderr"])]
        row.append(words.change(perplexity["increase"]) if compared else words.ABSENT)
        rows.append([*row, *([show.figure(fidelity["bits_per_byte"]["compressed"])] if with_bytes else [])])
    tables: list[Item] = [Table("Perplexity: how surprised a model is by the text", head, rows, range(1, len(head)))]
    if compared:
        tables.append(_distances(compared))
    return tables


def _distances(compared: Sequence[Report]) -> Table:
    known = [name for name in ("median", "p90", "p99", "max") if name in compared[0]["fidelity"]["kl"]]
    top5 = "top5" in compared[0]["fidelity"]["agreement"]
    titles = {"median": "median", "p90": "90 % below", "p99": "99 % below", "max": "largest"}
    head = ["model", "mean KL", *(titles[name] for name in known), "same next token"]
    rows: list[list[Cell | str]] = []
    for subject in compared:
        kl, agreement = subject["fidelity"]["kl"], subject["fidelity"]["agreement"]
        row: list[Cell | str] = [_model(subject), show.with_error(kl["mean"], kl["stderr"], 3)]
        row += [show.figure(kl[name], 3) for name in known]
        row.append(words.share(agreement["top1"], agreement["stderr"]))
        rows.append([*row, *([show.percent(agreement["top5"], 2)] if top5 else [])])
    if top5:
        head.append("top 5 shared")
    caption = "Distance from the original: KL divergence of the next-token predictions, in nats per token"
    return Table(caption, head, rows, range(1, len(head)))


def _model(subject: Report) -> Cell:
    return Cell(subject["name"], "code")


def _figures(judged: Sequence[Report]) -> list[Item]:
    looks = {index: Look.of(index) for index in range(len(judged))}
    found: list[Item] = []
    counted = [
        plots.Counts(subject["name"], looks[index], histogram["edges"], histogram["counts"])
        for index, subject in enumerate(judged)
        if (histogram := (subject["fidelity"].get("kl") or {}).get("histogram")) and any(histogram["counts"])
    ]
    if counted:
        found.append(_histogram(judged, counted))
    ranges = [(i, subject) for i, subject in enumerate(judged) if subject["fidelity"].get("by_position")]
    for measure, name, y, form in (
        ("kl", "KL by position", "mean KL, nats per token", plots.number),
        ("top1", "Agreement by position", "same next token", plots.percent),
    ):
        traces = []
        for index, subject in ranges:
            kept = [each for each in subject["fidelity"]["by_position"] if words.finite(each[measure])]
            if kept:
                starts, ends = [each["start"] for each in kept], [each["end"] for each in kept]
                trace = plots.Trace(subject["name"], looks[index], starts, [each[measure] for each in kept])
                traces.append((trace, ends))
        if traces:
            drawing = plots.ranges(traces, f"position-{measure}", x="position in the window", y=y, y_format=form)
            legend = _legend([trace for trace, _ in traces])
            found.append(Figure(name, drawing, _drift(traces[0][0], form, alone=len(traces) == 1), legend))
    return found


def _histogram(judged: Sequence[Report], counted: Sequence[plots.Counts]) -> Figure:
    kl = judged[0]["fidelity"]["kl"]
    marks: list[plots.Mark] = []
    if len(counted) == 1 and words.finite(kl["mean"]) and words.finite(kl["p99"]):
        marks = [plots.Mark("mean", kl["mean"]), plots.Mark("99 % below", kl["p99"])]
        says = (
            f"Half of all tokens are below {show.figure(kl['median'], 2)} nats, 99 % below "
            f"{show.figure(kl['p99'], 2)}; the largest is {show.figure(kl['max'], 2)}."
        )
    else:
        says = "The further left a model's hill, the closer it stays to the original."
    drawing = plots.histogram(counted, "histogram", x="KL of a token, nats", y="share of tokens", marks=marks)
    return Figure("How KL is spread over tokens", drawing, says, _legend(counted))


def _legend(drawn: Sequence[plots.Counts | plots.Trace]) -> list[Legend]:
    return [each.look.legend(each.name) for each in drawn] if len(drawn) > 1 else []


def _drift(trace: plots.Trace, form: plots.Format, *, alone: bool) -> str:
    """What a line over positions does, in words."""
    if not alone:
        return "The further right, the longer the text that a prediction can draw on."
    shown = [form(float(f"{value:.3g}")) for value in (trace.ys[0], trace.ys[-1])]
    return f"{shown[0]} at the beginning of a window, {shown[1]} at its end."


def _domains(judged: Sequence[Report]) -> list[Item]:
    with_domains = [subject for subject in judged if subject["domains"]]
    if not with_domains:
        return []
    several = len(judged) > 1
    compared = any(subject["fidelity"].get("kl") is not None for subject in with_domains)
    head = ["domain", *(["model"] if several else []), "tokens", "perplexity"]
    head += ["KL", "same next token"] if compared else []
    rows: list[list[Cell | str]] = []
    names = list(dict.fromkeys(domain["name"] for subject in with_domains for domain in subject["domains"]))
    for name in names:
        for subject in with_domains:
            own = [domain for domain in subject["domains"] if domain["name"] == name]
            rows += [_domain(domain, subject if several else None, compared=compared) for domain in own]
    table = Table("Accuracy by domain", head, rows, range(2 if several else 1, len(head)), folded=several)
    return [*_domain_figures(judged, names), table]


def _domain_figures(judged: Sequence[Report], names: Sequence[str]) -> list[Item]:
    """A row per domain, a dot per model: KL, and the share of tokens that differ."""
    found: list[Item] = []
    for title, x, form, loss in (
        ("KL by domain", "mean KL, nats per token", plots.number, lambda domain: domain["kl"]),
        ("Changed tokens by domain", "next token differs", plots.percent, lambda domain: 1 - domain["top1"]),
    ):
        traces = []
        for index, subject in enumerate(judged):
            measured = [domain for domain in subject["domains"] if words.finite(domain["kl"])]
            if measured:
                rows = [names.index(domain["name"]) for domain in measured]
                traces.append(plots.Trace(subject["name"], Look.of(index), [loss(d) for d in measured], rows))
        if not traces or len(names) < 2:
            continue
        drawing = plots.dots(names, traces, f"domains-{len(found)}", x=x, x_format=form)
        worst = max((value, names[int(row)]) for trace in traces for value, row in zip(trace.xs, trace.ys, strict=True))
        says = f"Most on {worst[1]}: {form(float(f'{worst[0]:.2g}'))}."
        legend = [trace.look.legend(trace.name, dot=True) for trace in traces] if len(traces) > 1 else []
        found.append(Figure(title, drawing, says, legend))
    return found


def _domain(domain: Report, subject: Report | None, *, compared: bool) -> list[Cell | str]:
    perplexity = domain["perplexity"]
    before = f"{show.figure(perplexity['dense'])} before" if compared else ""
    return [
        domain["name"],
        *([] if subject is None else [_model(subject)]),
        f"{domain['tokens']:,}",
        Cell(show.figure(perplexity["compressed"]), note=before),
        *([show.figure(domain["kl"], 3), show.percent(domain["top1"], 2)] if compared else []),
    ]


def _tasks(judged: Sequence[Report]) -> list[Item]:
    several = len(judged) > 1
    rows: list[list[Cell | str]] = []
    scored = [(subject, row) for subject in judged for row in (subject["tasks"] or {}).get("rows", [])]
    for subject, row in sorted(scored, key=lambda pair: (pair[1]["task"], pair[1]["metric"])) if several else scored:
        model = [_model(subject)] if several else []
        rows.append([Cell(row["task"], note=row["metric"]), *model, *show.scored(row, words.ABSENT)])
    if not rows:
        return []
    head = ["task", *(["model"] if several else []), *show.SCORED]
    caption = "Lost: answers that were right and are wrong now. p: how likely such a change is by chance"
    return [Table(caption, head, rows, range(2 if several else 1, len(head)))]


def _worst(subject: Report, *, several: bool) -> Quotes:
    quotes = [
        Quote(
            _end(each["context"]),
            each["dense_next"],
            each["compressed_next"],
            each["next"],
            show.figure(each["kl"], 3),
            f"window {each['window']}, position {each['position']}",
        )
        for each in subject["worst"]
    ]
    return Quotes(subject["name"] if several else "", quotes)


def _end(context: str) -> str:
    """The last characters of a context, where the models part."""
    return context if len(context) <= CONTEXT else "…" + context[-CONTEXT:]
