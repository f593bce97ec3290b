"""The outcome of a run in a few lines of plain ASCII, for a terminal or a log."""

from collections.abc import Mapping
from typing import Any

from llmpare.compress.report import distilled, gates, show

Section = Mapping[str, Any]


def lines(report: Section) -> list[str]:
    """What it cost and what it gave: sizes, fidelity, concerns, gates. report: as schema.json says."""
    if report["command"] == "evaluate":
        result = [line for candidate in report["candidates"] for line in _candidate(candidate, report)]
    else:
        size, bits = report["size"], report["size"]["linear_bits_per_weight"]
        result = [
            f"size        {show.size(size['source_bytes'])} -> {show.size(size['output_bytes'])}"
            f" ({show.percent(size['ratio'])})"
            + ("" if bits is None else f", compressed linears at {bits:.3f} bits per weight"),
            *_removed(report),
            *_fidelity(report["fidelity"]),
        ]
        if report["command"] == "distill":
            result.append(f"training    {distilled.summary(report['distillation'])}")
    result.append(
        f"cost        {show.duration(report['cost']['total_seconds'])},"
        f" {show.size(report['cost']['peak_rss_bytes'])} of memory"
    )
    result += [f"fallback    {fallback['name']}: {fallback['action']}" for fallback in report["fallbacks"][:3]]
    if len(report["fallbacks"]) > 3:
        result.append(f"fallbacks   {len(report['fallbacks'])} in all, see report.md")
    result += [f"gate        {gates.describe(gate)}, passed" for gate in report["gates"] if gate["passed"]]
    return result


def _removed(report: Section) -> list[str]:
    """What pruning took away."""
    if "mask" in report:
        mask = report["mask"]
        return [f"zeros       {show.percent(mask['sparsity'], 2)} of {show.count(mask['weights'])} weights in linears"]
    if "structure" in report:
        parameters = report["structure"]["parameters"]
        return [f"parameters  {show.count(parameters['dense'])} -> {show.count(parameters['kept'])}"]
    return []


def _candidate(candidate: Section, report: Section) -> list[str]:
    size, bits = candidate["size"], candidate["size"]["linear_bits_per_weight"]
    own = show.size(size["bytes"])
    if size["baseline_bytes"] is not None:
        own = f"{show.size(size['baseline_bytes'])} -> {own} ({show.percent(size['ratio'])})"
    result = [f"model       {candidate['name']}"] if len(report["candidates"]) > 1 else []
    result.append(f"size        {own}" + ("" if bits is None else f", packed linears at {bits:.3f} bits per weight"))
    result += _fidelity(candidate["fidelity"])
    for row in (candidate["tasks"] or {"rows": []})["rows"]:
        kept = "" if row["recovery"] is None else f", {show.percent(row['recovery'], 2)} of the baseline"
        result.append(f"task        {row['task']} {row['metric']} {show.figure(row['value'])}{kept}")
    if candidate["speed"] is not None:
        result.append(f"speed       {show.figure(gates.throughput(candidate['speed']))} tokens per second at most")
    return result


def _fidelity(fidelity: Section) -> list[str]:
    perplexity, kl, agreement = fidelity["perplexity"], fidelity["kl"], fidelity["agreement"]
    if kl is None:
        stderr = show.figure(perplexity["compressed_stderr"], 2)
        result = [f"perplexity  {show.figure(perplexity['compressed'])} +- {stderr} on {fidelity['tokens']:,} tokens"]
        bits = fidelity["bits_per_byte"]["compressed"]
        return result + ([] if bits is None else [f"bits        {show.figure(bits)} per byte"])
    return [
        f"perplexity  {show.figure(perplexity['dense'])} -> {show.figure(perplexity['compressed'])}"
        f" ({show.percent(perplexity['increase'], 2, signed=True)}) on {fidelity['tokens']:,} tokens",
        f"KL          {show.figure(kl['mean'])} +- {show.figure(kl['stderr'], 2)} nats per token",
        f"agreement   {show.percent(agreement['top1'], 2)} +- {show.percent(agreement['stderr'], 2)}"
        " of the most likely tokens",
    ]
