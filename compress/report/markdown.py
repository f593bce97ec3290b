"""report.md: a report as people read it, in a pull request, a job summary or a terminal.

Names, paths and text from models and data sets are shown as code or escaped; they never act as Markdown or HTML.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmpare.compress.report import gates, show

WORST_LINEARS = 8

Section = Mapping[str, Any]


def render(report: Section) -> str:
    """The whole page, ending with a newline. report: as schema.json says, fresh or read back."""
    sections = (
        _headline(report),
        _gates(report["gates"]),
        _concerns(report),
        _blocks(report["blocks"]),
        _kept_dense(report["kept_dense"]),
        _texts(report),
        _cost(report["cost"]),
        _environment(report),
        _loading(report["request"]),
    )
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def code(text: str) -> str:
    """text as a code span that also holds inside a table cell."""
    text = show.printable(text).replace("|", "\\|")
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if runs else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def plain(text: str) -> str:
    """text as running text, with every character that Markdown or HTML would act on escaped."""
    return re.sub(r"([\\`*_\[\]<>|~&#!])", r"\\\1", show.printable(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> list[str]:
    """A table; `right` holds the numbers of the columns that are aligned to the right ('12')."""
    rule = ["---:" if str(i) in right else "---" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _headline(report: Section) -> list[str]:
    request, size, fidelity = report["request"], report["size"], report["fidelity"]
    perplexity, kl, agreement = fidelity["perplexity"], fidelity["kl"], fidelity["agreement"]
    bits = size["linear_bits_per_weight"]
    rows = [
        (
            "size",
            show.size(size["source_bytes"]),
            show.size(size["output_bytes"]),
            show.percent(size["ratio"]),
        ),
        (
            "perplexity",
            _with_error(perplexity["dense"], perplexity["dense_stderr"]),
            _with_error(perplexity["compressed"], perplexity["compressed_stderr"]),
            show.percent(perplexity["increase"], 2, signed=True),
        ),
        (
            "KL divergence, nats per token",
            "",
            _with_error(kl["mean"], kl["stderr"]),
            f"median {show.figure(kl['median'], 3)}, 99 % below {show.figure(kl['p99'], 3)}",
        ),
        (
            "same most likely token",
            "",
            f"{show.percent(agreement['top1'], 2)} ± {show.percent(agreement['stderr'], 2)}",
            "",
        ),
        (
            "bits per weight of the compressed linears",
            "",
            "none" if bits is None else f"{bits:.3f}",
            f"{show.percent(size['share_compressed'])} of {show.count(size['parameters_total'])} parameters",
        ),
    ]
    return [
        f"# {code(request['model'])} with {request['method']}, {_scheme(request['scheme'])}",
        "",
        f"**{'Passed' if report['passed'] else 'Not passed'}.** Measured on {fidelity['tokens']:,} tokens that the "
        f"compression has not seen, both models in {fidelity['dtype']}, in the same pass.",
        "",
        *_table(("", "dense", "compressed", ""), rows, right="12"),
    ]


def _with_error(value: float | None, error: float | None) -> str:
    return f"{show.figure(value)} ± {show.figure(error, 2)}"


def _scheme(scheme: Section) -> str:
    group = "per channel" if scheme["group_size"] == -1 else f"group {scheme['group_size']}"
    return f"{scheme['bits']} bits, {group}, {'symmetric' if scheme['symmetric'] else 'asymmetric'}"


def _gates(entries: Sequence[Section]) -> list[str]:
    if not entries:
        return []
    rows = [(g["name"], *gates.figures(g), "passed" if g["passed"] else "**failed**") for g in entries]
    return ["## Gates", "", *_table(("gate", "measured", "limit", ""), rows, right="12")]


def _concerns(report: Section) -> list[str]:
    lines: list[str] = []
    if report["fallbacks"]:
        rows = [(code(f["name"]), plain(f["cause"]), plain(f["action"])) for f in report["fallbacks"]]
        lines += ["## Fallbacks", "", *_table(("where", "why", "what was done"), rows)]
    if report["warnings"]:
        lines += [""] * bool(lines) + ["## Warnings", "", *(f"- {plain(w)}" for w in report["warnings"])]
    return lines


def _blocks(blocks: Sequence[Section]) -> list[str]:
    rows = [
        (
            str(block["index"]),
            show.figure(block["relative_error"], 3),
            ", ".join(sorted({linear["scheme"] for linear in block["linears"]})) or "dense",
            "resumed" if block["resumed"] else show.duration(block["seconds"]),
        )
        for block in blocks
    ]
    linears = [linear for block in blocks for linear in block["linears"]]
    worst = sorted(linears, key=lambda linear: -(linear["relative_error"] or 0.0))[:WORST_LINEARS]
    worst_rows = [
        (
            code(linear["name"]),
            f"{linear['rows']} × {linear['columns']}",
            f"{linear['scheme']}, {linear['method']}",
            show.figure(linear["relative_error"], 3),
        )
        for linear in worst
    ]
    return [
        "## Blocks",
        "",
        "Relative error: squared error of the output over the squared output, with the errors of all blocks before.",
        "",
        *_table(("block", "relative error", "scheme", "time"), rows, right="013"),
        "",
        f"The {len(worst)} linears with the largest error of their own, of {len(linears)}:",
        "",
        *_table(("linear", "shape", "scheme", "relative error"), worst_rows, right="3"),
    ]


def _kept_dense(kept: Sequence[Section]) -> list[str]:
    if not kept:
        return []
    reasons: dict[str, list[str]] = {}
    for linear in kept:
        reasons.setdefault(linear["why"], []).append(linear["name"])
    return ["## Left dense", ""] + [
        f"- {plain(why)}: {code(names[0])}" + (f" and {len(names) - 1} more" if names[1:] else "")
        for why, names in reasons.items()
    ]


def _texts(report: Section) -> list[str]:
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
        *_table(("", "data set", "windows × tokens", "sha256", "begins with"), rows),
        "",
        f"{show.percent(report['overlap'])} of the evaluation text also occurs in the calibration text.",
    ]


def _cost(cost: Section) -> list[str]:
    device = cost["peak_device_bytes"]
    memory = f"{show.size(cost['peak_rss_bytes'])} of memory" + (
        "" if device is None else f" and {show.size(device)} on the device"
    )
    rows = [(plain(phase), show.duration(seconds)) for phase, seconds in cost["seconds"].items()]
    return [
        "## Cost",
        "",
        f"{show.duration(cost['total_seconds'])} and at most {memory}.",
        "",
        *_table(("phase", "time"), rows, right="1"),
    ]


def _environment(report: Section) -> list[str]:
    environment, source = report["environment"], report["source"]
    rows = [(name, code(str(value))) for name, value in environment.items()]
    rows += [
        ("architecture", code(source["architecture"])),
        ("source weights", code(source["weights_sha256"][:16])),
    ]
    return ["## Environment", "", *_table(("", ""), rows)]


def _loading(request: Section) -> list[str]:
    """How to load the output: only what the format's readers are known to accept."""
    out, scheme = request["out"], request["scheme"]
    served = request["format"] != "gptq" or (scheme["symmetric"] and scheme["bits"] in (4, 8))
    arguments = "OUT"
    imports = "AutoModelForCausalLM"
    if request["format"] == "compressed-tensors" and not scheme["symmetric"]:
        # transformers 5.23 with compressed-tensors 0.20 cannot load packed zero points any other way.
        imports += ", CompressedTensorsConfig"
        arguments += ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    lines = ["## Loading it", "", f"OUT is {code(out)}.", "", "```python"]
    lines += [
        f"from transformers import {imports}",
        f"model = AutoModelForCausalLM.from_pretrained({arguments})",
        "```",
    ]
    if request["format"] == "gptq":
        lines += ["", "transformers needs the packages optimum and gptqmodel for this format."]
    if served:
        lines += ["", "```", "vllm serve OUT", "```"]
    return lines
