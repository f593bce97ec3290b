"""Sections of report.md that every command has that makes a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmpare.compress.report import show
from llmpare.compress.report.marks import code, plain, table

Section = Mapping[str, Any]
WORST_LINEARS = 8


def headline(report: Section, how: str, more: Sequence[Sequence[str]]) -> list[str]:
    """What came out. how: what was done, for the title. more: rows of the table that only this command has."""
    size, fidelity = report["size"], report["fidelity"]
    perplexity, kl, agreement = fidelity["perplexity"], fidelity["kl"], fidelity["agreement"]
    rows = [
        (
            "size",
            show.size(size["source_bytes"]),
            show.size(size["output_bytes"]),
            show.percent(size["ratio"]),
        ),
        (
            "perplexity",
            show.with_error(perplexity["dense"], perplexity["dense_stderr"]),
            show.with_error(perplexity["compressed"], perplexity["compressed_stderr"]),
            show.percent(perplexity["increase"], 2, signed=True),
        ),
        (
            "KL divergence, nats per token",
            "",
            show.with_error(kl["mean"], kl["stderr"]),
            f"median {show.figure(kl['median'], 3)}, 99 % below {show.figure(kl['p99'], 3)}",
        ),
        (
            "same most likely token",
            "",
            f"{show.percent(agreement['top1'], 2)} ± {show.percent(agreement['stderr'], 2)}",
            "",
        ),
        *more,
    ]
    return [
        f"# {code(report['request']['model'])} {how}",
        "",
        f"**{'Passed' if report['passed'] else 'Not passed'}.** Measured on {fidelity['tokens']:,} tokens that the "
        f"compression has not seen, both models in {fidelity['dtype']}, in the same pass.",
        "",
        *table(("", "dense", "compressed", ""), rows, right="12"),
    ]


def blocks(
    found: Sequence[Section],
    what: str,
    of_block: Callable[[Section], str],
    of_linear: Mapping[str, Callable[[Section], str]],
    told: str = "",
) -> list[str]:
    """Every block, and the linears with the largest error.

    what, of_block: title of the blocks' third column, and what it says. of_linear: the same for the columns of the
    linears' table after name and shape, one of words and then figures. told: what those figures are, if titles do not
    say it all.
    """
    rows = [
        (
            str(block["index"]),
            show.figure(block["relative_error"], 3),
            of_block(block),
            "resumed" if block["resumed"] else show.duration(block["seconds"]),
        )
        for block in found
    ]
    linears = [linear for block in found for linear in block["linears"]]
    worst = sorted(linears, key=lambda linear: -(linear["relative_error"] or 0.0))[:WORST_LINEARS]
    worst_rows = [
        (
            code(linear["name"]),
            f"{linear['rows']} × {linear['columns']}",
            *(said(linear) for said in of_linear.values()),
        )
        for linear in worst
    ]
    figures = "".join(map(str, range(3, 2 + len(of_linear))))
    return [
        "## Blocks",
        "",
        "Relative error: squared error of the output over the squared output, with the errors of all blocks before.",
        "",
        *table(("block", "relative error", what, "time"), rows, right="013"),
        "",
        f"The {len(worst)} linears with the largest error of their own, of {len(linears)}:{told}",
        "",
        *table(("linear", "shape", *of_linear), worst_rows, right=figures),
    ]


def experts(found: Section | None) -> list[str]:
    """What the router of every mixture sent to its experts."""
    if found is None:
        return []
    rows = []
    for mixture in found["mixtures"]:
        counts = mixture["tokens"].values()
        rows.append(
            (
                code(mixture["name"]),
                str(len(counts)),
                show.count(min(counts)),
                show.count(max(counts)),
                ", ".join(f"{expert} ({mixture['tokens'][str(expert)]})" for expert in mixture["borrowed"]) or "none",
            )
        )
    return [
        "## Experts",
        "",
        f"{show.count(found['parameters'])} of the compressed weights belong to experts. Those with fewer tokens than "
        f"inputs borrowed statistics from the other experts of their mixture: {show.percent(found['borrowed_share'])} "
        "of all compressed weights.",
        "",
        *table(
            ("mixture", "experts", "fewest tokens", "most tokens", "borrowed, with their tokens"), rows, right="123"
        ),
    ]


def kept_dense(kept: Sequence[Section]) -> list[str]:
    """What stayed as it was."""
    if not kept:
        return []
    reasons: dict[str, list[str]] = {}
    for linear in kept:
        reasons.setdefault(linear["why"], []).append(linear["name"])
    return ["## Left dense", ""] + [
        f"- {plain(why)}: {code(names[0])}" + (f" and {len(names) - 1} more" if names[1:] else "")
        for why, names in reasons.items()
    ]


def texts(report: Section) -> list[str]:
    """What was learned from, and what was measured on."""
    rows = [
        (
            part,
            code(source["dataset"]),
            f"{source['windows']} × {source['seqlen']}",
            code(source["sha256"][:16]),
            code(source["first_line"]),
        )
        for part, source in (("calibration", report["calibration"]), ("evaluation", report["evaluation"]))
        if source is not None
    ]
    return [
        "## Text",
        "",
        *table(("", "data set", "windows × tokens", "sha256", "begins with"), rows),
        "",
        f"{show.percent(report['overlap'])} of the evaluation text also occurs in the calibration text.",
    ]


def environment(report: Section) -> list[str]:
    """Where, with what, from what."""
    environment, source = report["environment"], report["source"]
    rows = [(name, code(str(value))) for name, value in environment.items()]
    rows += [
        ("architecture", code(source["architecture"])),
        ("source weights", code(source["weights_sha256"][:16])),
        ("stored as", code(source["scheme"])),
    ]
    return ["## Environment", "", *table(("", ""), rows)]
