"""Statistics of what flows into single experts, and what stands in for those that see too little.

An expert that sees fewer tokens than it has inputs has a singular Gram matrix. It is topped up with that of all
experts of its mixture together, as if as many more tokens of theirs had come as are missing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from llmpare.compress.batches import experts_at_once
from llmpare.compress.gram import Gram
from llmpare.compress.grid import Statistics
from llmpare.compress.model.experts import Routed
from llmpare.compress.model.layout import Linear

EXPERTS = "experts"  # the name of their facts in a block's record, and of their section in the report
Readers = Mapping[int, list[str]]
Learned = Iterator[list[tuple[list[str], Statistics]]]


def learn(flows: Sequence[Routed], readers: Readers, *, everything: bool) -> Learned:
    """Names of the linears and statistics of some experts at a time. flows: one per batch; readers: linears by expert.

    Only their matrices are in memory, besides that of all experts together if it is needed.
    """
    counts = [sum(each) for each in zip(*(flow.counts for flow in flows), strict=True)]
    sample = flows[0].of(0)
    columns, device = sample.shape[-1], sample.device
    short = not everything and any(counts[expert] < columns for expert in readers)
    pool = _pooled(flows, columns, device) if short else None
    for some in _some(readers, columns, device):
        learned = []
        for expert, names in some:
            gram = Gram(columns, device)
            for flow in flows:
                gram.add(flow.of(expert))
            learned.append((names, _of_expert(gram, pool, counts[expert])))
        yield learned
        del learned, gram


class Grams:
    """The same when batches come one after the other: the matrices of all experts are in memory."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts = experts
        self._grams: dict[int, Gram] = {}
        self._counts = dict.fromkeys(experts, 0)

    def add(self, flow: Routed) -> None:
        """Learns from one batch."""
        for expert in self._experts:
            x = flow.of(expert)
            self._grams.setdefault(expert, Gram(x.shape[-1], x.device)).add(x)
            self._counts[expert] += flow.counts[expert]

    def statistics(self, readers: Readers, *, everything: bool) -> Learned:
        """See `learn`; what was learned is given away."""
        first = next(iter(self._grams.values())).gram
        pool = None
        if not everything and any(count < len(first) for count in self._counts.values()):
            pool = Gram(len(first), first.device)
            for gram in self._grams.values():
                pool.gram += gram.gram
                pool.tokens += gram.tokens
        for some in _some(readers, len(first), first.device):
            yield [(names, _of_expert(self._grams.pop(each), pool, self._counts[each])) for each, names in some]


def _some(readers: Readers, columns: int, device: torch.device) -> Iterator[list[tuple[int, list[str]]]]:
    """Experts that are learned about, and then solved, at once."""
    rest = iter(readers.items())
    while some := list(islice(rest, experts_at_once(columns, device.type))):
        yield some


def _pooled(flows: Sequence[Routed], columns: int, device: torch.device) -> Gram:
    pool = Gram(columns, device)
    for flow in flows:
        for x in flow.together():
            pool.add(x)
    return pool


def _of_expert(gram: Gram, pool: Gram | None, count: int) -> Statistics:
    missing = 0 if pool is None else max(0, len(gram.gram) - gram.tokens)
    if pool is not None and missing:
        gram.gram.add_(pool.gram, alpha=missing / pool.tokens)
        gram.tokens += missing
    return replace(gram.statistics(), tokens=count, borrowed=missing)


class Tally:
    """What the experts of one block saw, for its report."""

    def __init__(self) -> None:
        self._tokens: dict[str, dict[int, int]] = defaultdict(dict)
        self._short: dict[str, dict[int, int]] = defaultdict(dict)
        self._weights = [0, 0]  # of experts, and of those that borrowed

    def note(self, linears: Sequence[Linear], statistics: Statistics | None) -> None:
        """Counts in linears that share an input with those statistics."""
        if statistics is None or statistics.tokens is None:
            return
        for linear in linears:
            assert linear.expert is not None
            self._tokens[linear.expert.mixture][linear.expert.index] = statistics.tokens
            self._weights[0] += linear.rows * linear.columns
            if statistics.borrowed:
                self._short[linear.expert.mixture][linear.expert.index] = statistics.tokens
                self._weights[1] += linear.rows * linear.columns

    def added(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts of the block with those of its experts, if it has any."""
        if not self._tokens:
            return facts
        mixtures = [
            {
                "name": name,
                "tokens": {str(expert): count for expert, count in sorted(tokens.items())},
                "borrowed": sorted(self._short[name]),
            }
            for name, tokens in self._tokens.items()
        ]
        short = [_fallback(name, experts) for name, experts in self._short.items() if experts]
        parameters, borrowed = self._weights
        experts = {"parameters": parameters, "borrowed_parameters": borrowed, "mixtures": mixtures}
        return {**facts, EXPERTS: experts, "fallbacks": [*facts["fallbacks"], *short]}


def section(records: Sequence[Mapping[str, Any]], compressed: int) -> dict[str, Any]:
    """The report's section on experts, if there are any. records: of all blocks. compressed: weights in linears."""
    found = [(record["index"], record[EXPERTS]) for record in records if EXPERTS in record]
    if not found:
        return {}
    borrowed = sum(experts["borrowed_parameters"] for _, experts in found)
    return {
        EXPERTS: {
            "parameters": sum(experts["parameters"] for _, experts in found),
            "borrowed_parameters": borrowed,
            "borrowed_share": borrowed / compressed,
            "mixtures": [{"block": index, **mixture} for index, experts in found for mixture in experts["mixtures"]],
        }
    }


def _fallback(mixture: str, short: Mapping[int, int]) -> dict[str, str]:
    named = ", ".join(f"{expert} ({count})" for expert, count in sorted(short.items()))
    return {
        "name": mixture,
        "cause": f"experts with fewer tokens than inputs: {named}",
        "action": "statistics topped up with those of all experts of the mixture",
    }
