"""The outcome of a run in a few lines of plain ASCII, for a terminal or a log."""

from collections.abc import Mapping
from typing import Any

from llmpare.compress.report import gates, show


def lines(report: Mapping[str, Any]) -> list[str]:
    """What it cost and what it gave: sizes, fidelity, concerns, gates. report: as schema.json says."""
    size, fidelity = report["size"], report["fidelity"]
    perplexity, kl, agreement = fidelity["perplexity"], fidelity["kl"], fidelity["agreement"]
    bits = size["linear_bits_per_weight"]
    result = [
        f"size        {show.size(size['source_bytes'])} -> {show.size(size['output_bytes'])}"
        f" ({show.percent(size['ratio'])})"
        + ("" if bits is None else f", compressed linears at {bits:.3f} bits per weight"),
        f"perplexity  {show.figure(perplexity['dense'])} -> {show.figure(perplexity['compressed'])}"
        f" ({show.percent(perplexity['increase'], 2, signed=True)}) on {fidelity['tokens']:,} tokens",
        f"KL          {show.figure(kl['mean'])} +- {show.figure(kl['stderr'], 2)} nats per token",
        f"agreement   {show.percent(agreement['top1'], 2)} +- {show.percent(agreement['stderr'], 2)}"
        " of the most likely tokens",
        f"cost        {show.duration(report['cost']['total_seconds'])},"
        f" {show.size(report['cost']['peak_rss_bytes'])} of memory",
    ]
    result += [f"fallback    {fallback['name']}: {fallback['action']}" for fallback in report["fallbacks"][:3]]
    if len(report["fallbacks"]) > 3:
        result.append(f"fallbacks   {len(report['fallbacks'])} in all, see report.md")
    result += [f"gate        {gates.describe(gate)}, passed" for gate in report["gates"] if gate["passed"]]
    return result
