"""Which combination of widths and depth meets a target at the least cost, from costs measured one at a time.

A knob's cost is the KL divergence from the original model when that knob alone is turned, measured at a few places
and taken as linear in between; costs of several knobs add up. That is an estimate for choosing: what the chosen
combination really costs is measured afterwards like that of any other run, and is less, since the measured costs are
those of plain removal and the run refits what remains.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

Curve = Sequence[tuple[int, float]]  # (how many are kept, KL divergence in nats), ascending, the last keeps all


@dataclass(frozen=True)
class Choice:
    """How many FFN channels, KV groups and blocks to keep; the size of that, and the cost that is expected."""

    ffn: int
    heads: int
    depth: int
    size: int
    kl: float


def cost(curve: Curve, kept: int) -> float:
    """The cost of keeping so many, between the two nearest measured places."""
    counts = [count for count, _ in curve]
    place = bisect_left(counts, kept)
    if counts[place] == kept:
        return curve[place][1]
    (low, a), (high, b) = curve[place - 1 : place + 1]
    return a + (b - a) * (kept - low) / (high - low)


def choose(
    ffn: Curve,
    heads: Curve,
    depth: Curve,
    channels: Sequence[int],
    size: Callable[[int, int, int], int],
    *,
    max_size: int | None = None,
    max_kl: float | None = None,
) -> Choice | None:
    """The cheapest combination of at most max_size, or the smallest that is expected to cost at most max_kl.

    channels: the numbers of FFN channels that may be kept, within those measured. size(ffn, heads, depth): of the
    output. None if no combination will do.
    """
    every = [
        Choice(f, h, d, size(f, h, d), cost(ffn, f) + cost(heads, h) + cost(depth, d))
        for f, (h, _), (d, _) in product(channels, heads, depth)
    ]
    if max_size is not None:
        return min((c for c in every if c.size <= max_size), key=lambda c: (c.kl, c.size), default=None)
    assert max_kl is not None
    return min((c for c in every if c.kl <= max_kl), key=lambda c: (c.size, c.kl), default=None)
