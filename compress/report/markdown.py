"""report.md: a report as people read it, in a pull request, a job summary or a terminal.

Names, paths and text from models and data sets are shown as code or escaped; they never act as Markdown or HTML.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmpare.compress.report import common, distilled, evaluated, made, pruned, show
from llmpare.compress.report.marks import code

Section = Mapping[str, Any]


def render(report: Section) -> str:
    """The whole page, ending with a newline. report: as schema.json says, fresh or read back."""
    sections = _COMMANDS[report["command"]](report)
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _quantized(report: Section) -> Sequence[list[str]]:
    """The sections on a run that quantized."""
    return (
        made.headline(
            report, f"with {report['request']['method']}, {_scheme(report['request']['scheme'])}", _bits(report)
        ),
        common.gates(report["gates"]),
        common.concerns(report),
        _blocks(report["blocks"]),
        made.experts(report.get("experts")),
        made.kept_dense(report["kept_dense"]),
        made.texts(report),
        common.cost(report["cost"]),
        made.environment(report),
        _loading(report["request"], report["source"]["architecture"]),
    )


def _bits(report: Section) -> list[tuple[str, ...]]:
    size = report["size"]
    bits = size["linear_bits_per_weight"]
    return [
        (
            "bits per weight of the compressed linears",
            "",
            "none" if bits is None else f"{bits:.3f}",
            f"{show.percent(size['share_compressed'])} of {show.count(size['parameters_total'])} parameters",
        ),
    ]


def _scheme(scheme: Section) -> str:
    kind = "symmetric" if scheme["symmetric"] else "asymmetric"
    return f"{scheme['bits']} bits, {show.groups(scheme['group_size'])}, {kind}"


def _blocks(blocks: Sequence[Section]) -> list[str]:
    return made.blocks(
        blocks,
        "scheme",
        lambda block: ", ".join(sorted({linear["scheme"] for linear in block["linears"]})) or "dense",
        {
            "scheme": lambda linear: f"{linear['scheme']}, {linear['method']}",
            "relative error": lambda linear: show.figure(linear["relative_error"], 3),
        },
    )


def _loading(request: Section, architecture: str) -> list[str]:
    """How to load the output: only what the format's readers are known to accept."""
    out, scheme = request["out"], request["scheme"]
    served = request["format"] != "gptq" or (scheme["symmetric"] and scheme["bits"] in (4, 8))
    arguments = "OUT"
    # encoder-decoders are refused, so a model of this name is a decoder that also sees
    family = "ImageTextToText" if architecture.endswith("ForConditionalGeneration") else "CausalLM"
    imports = f"AutoModelFor{family}"
    if request["format"] == "compressed-tensors" and not scheme["symmetric"]:
        # transformers 5.23 with compressed-tensors 0.20 cannot load packed zero points any other way.
        imports += ", CompressedTensorsConfig"
        arguments += ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    lines = ["## Loading it", "", f"OUT is {code(out)}.", "", "```python"]
    lines += [
        f"from transformers import {imports}",
        f"model = AutoModelFor{family}.from_pretrained({arguments})",
        "```",
    ]
    if request["format"] == "gptq":
        lines += ["", "transformers needs the packages optimum and gptqmodel for this format."]
    if served:
        lines += ["", "```", "vllm serve OUT", "```"]
    return lines


_COMMANDS: Mapping[str, Callable[[Section], Sequence[list[str]]]] = {
    "quantize": _quantized,
    "prune": pruned.sections,
    "distill": distilled.sections,
    "evaluate": evaluated.sections,
}
