"""report.md of an evaluation: all candidates in one table, then what each did."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import common, show
from llmpare.compress.report.marks import code, plain, table

SHOWN = 10  # of the worst contexts; report.json has the rest
CONTEXT = 100  # characters before the place that are shown

Section = Mapping[str, Any]


def sections(report: Section) -> Sequence[list[str]]:
    """The sections of the page, in order. report: as schema.json says."""
    return (
        _verdict(report),
        _table(report),
        common.gates(report["gates"]),
        common.concerns(report),
        *(part for candidate in report["candidates"] for part in _candidate(candidate, report)),
        _text(report),
        common.cost(report["cost"]),
        _environment(report),
    )


def _verdict(report: Section) -> list[str]:
    baseline = report["baseline"]
    names = ", ".join(code(candidate["name"]) for candidate in report["candidates"])
    against = "" if baseline is None else f" against {code(baseline['model'])}"
    fidelity = report["candidates"][0]["fidelity"]
    lines = [
        f"# {names}{against}",
        "",
        f"**{'Passed' if report['passed'] else 'Not passed'}.** Measured on {fidelity['tokens']:,} tokens in windows "
        f"of {report['evaluation']['seqlen']}, all models in {fidelity['dtype']}.",
    ]
    if baseline is not None and baseline["saved"] is not None:
        lines += [
            "",
            f"The baseline was read from {code(baseline['saved']['folder'])}: the {baseline['saved']['top_k']} most "
            "likely tokens of each position and the rest as one, so that the divergence is a lower bound.",
        ]
    return lines


def _table(report: Section) -> list[str]:
    """A column for the baseline, if there is one, and one per candidate."""
    baseline, candidates = report["baseline"], report["candidates"]
    rows = [
        ("size", _size_of_baseline(baseline), [_size(c["size"]) for c in candidates]),
        ("stored as", baseline and code(baseline["scheme"]), [code(c["source"]["scheme"]) for c in candidates]),
        ("perplexity", _dense(candidates), [_perplexity(c["fidelity"]["perplexity"]) for c in candidates]),
        ("bits per byte", _dense_bits(candidates), [_bits(c["fidelity"], "compressed") for c in candidates]),
    ]
    if baseline is not None:
        rows += [
            ("KL divergence, nats per token", "", [_kl(c["fidelity"]["kl"]) for c in candidates]),
            ("same most likely token", "", [_agreement(c["fidelity"]["agreement"]) for c in candidates]),
            (
                "five most likely tokens shared",
                "",
                [show.percent(c["fidelity"]["agreement"]["top5"], 2) for c in candidates],
            ),
        ]
    head = ["", *(["baseline"] if baseline else []), *(code(candidate["name"]) for candidate in candidates)]
    cells = [(name, *([before or ""] if baseline else []), *after) for name, before, after in rows]
    return table(head, cells, right="123456789")


def _size_of_baseline(baseline: Section | None) -> str:
    return "" if baseline is None else show.size(baseline["weight_bytes"])


def _size(size: Section) -> str:
    ratio = "" if size["ratio"] is None else f" ({show.percent(size['ratio'])})"
    return f"{show.size(size['bytes'])}{ratio}"


def _dense(candidates: Sequence[Section]) -> str:
    perplexity = candidates[0]["fidelity"]["perplexity"]
    return show.with_error(perplexity["dense"], perplexity["dense_stderr"])


def _dense_bits(candidates: Sequence[Section]) -> str:
    return _bits(candidates[0]["fidelity"], "dense")


def _bits(fidelity: Section, which: str) -> str:
    value = fidelity["bits_per_byte"][which]
    return "" if value is None else show.figure(value)


def _perplexity(perplexity: Section) -> str:
    shown = show.with_error(perplexity["compressed"], perplexity["compressed_stderr"])
    increase = perplexity["increase"]
    return shown if increase is None else f"{shown} ({show.percent(increase, 2, signed=True)})"


def _kl(kl: Section) -> str:
    quantiles = f"median {show.figure(kl['median'], 3)}, 99 % below {show.figure(kl['p99'], 3)}"
    return f"{show.with_error(kl['mean'], kl['stderr'])}; {quantiles}"


def _agreement(agreement: Section) -> str:
    return f"{show.percent(agreement['top1'], 2)} ± {show.percent(agreement['stderr'], 2)}"


def _candidate(candidate: Section, report: Section) -> list[list[str]]:
    several = len(report["candidates"]) > 1
    of = f" of {code(candidate['name'])}" if several else ""
    return [
        _domains(candidate["domains"], of, paired=report["baseline"] is not None),
        _worst(candidate["worst"], of),
        _tasks(candidate["tasks"], of),
        _speed(candidate["speed"], of),
    ]


def _domains(rows: Sequence[Section], of: str, *, paired: bool) -> list[str]:
    if not rows:
        return []
    cells = []
    for row in rows:
        perplexity = row["perplexity"]
        own = (plain(row["name"]), f"{row['tokens']:,}", show.figure(perplexity["compressed"]))
        both = (show.figure(perplexity["dense"]), show.figure(row["kl"]), show.percent(row["top1"], 1))
        cells.append((*own, *both) if paired else own)
    head = ("text", "tokens", "perplexity", "of the baseline", "KL", "agreement")
    return [f"## Kinds of text{of}", "", *table(head if paired else head[:3], cells, right="12345")]


def _worst(places: Sequence[Section], of: str) -> list[str]:
    if not places:
        return []
    rows = [
        (
            show.figure(place["kl"], 3),
            code("…" + place["context"][-CONTEXT:]),
            code(place["next"]),
            code(place["dense_next"]),
            code(place["compressed_next"]),
        )
        for place in places[:SHOWN]
    ]
    head = ("KL", "after", "comes", "baseline expects", "model expects")
    return [f"## Where the predictions differ most{of}", "", *table(head, rows, right="0")]


def _tasks(tasks: Section | None, of: str) -> list[str]:
    if tasks is None:
        return []
    rows = [(code(row["task"]), plain(row["metric"]), *show.scored(row)) for row in tasks["rows"]]
    head = ("task", "metric", *show.SCORED)
    return [f"## Tasks{of}", "", *table(head, rows, right="23456")]


def _speed(speed: Section | None, of: str) -> list[str]:
    if speed is None:
        return []
    rows = [
        (
            plain(row["engine"]),
            row["mode"],
            str(row["batch"]),
            str(row["prompt"]),
            plain(show.setting(row)),
            _milliseconds(row["ttft_ms"]),
            _milliseconds(row["tpot_ms"]),
            show.figure(row["tokens_per_second"]),
            "" if row["peak_bytes"] is None else show.size(row["peak_bytes"]),
        )
        for row in speed["rows"]
    ]
    head = ("engine", "", "batch", "prompt", "setting", "first token", "per token", "tokens/s", "peak memory")
    lines = [f"## Speed{of}", "", *table(head, rows, right="235678")]
    for skipped in speed.get("skipped", []):
        lines += ["", f"Skipped: {plain(skipped['engine'])}, {plain(skipped['what'])}: {plain(skipped['why'])}"]
    return lines


def _milliseconds(value: Section | None) -> str:
    return "" if value is None else f"{show.figure(value['median'], 3)} ms ({show.figure(value['p90'], 3)})"


def _text(report: Section) -> list[str]:
    text = report["evaluation"]
    row = (
        code(text["dataset"]),
        f"{text['windows']} × {text['seqlen']}",
        f"{text['scored_bytes']:,}",
        code(text["sha256"][:16]),
        code(text["first_line"]),
    )
    head = ("data set", "windows × tokens", "bytes scored", "sha256", "begins with")
    return ["## Text", "", *table(head, [row], right="2")]


def _environment(report: Section) -> list[str]:
    rows = [(name, code(str(value))) for name, value in report["environment"].items()]
    models = [report["baseline"]] if report["baseline"] else []
    models += [candidate["source"] for candidate in report["candidates"]]
    rows += [(code(model["model"]), f"weights {code(model['weights_sha256'][:16])}") for model in models]
    return ["## Environment", "", *table(("", ""), rows)]
