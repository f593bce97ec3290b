"""The search for a combination, against trying all of them."""

from itertools import product

import pytest

from llmpare.compress.prune import target

FFN = [(128, 0.4), (192, 0.1), (256, 0.0)]
HEADS = [(1, 0.5), (2, 0.05), (4, 0.0)]
DEPTH = [(6, 0.3), (7, 0.12), (8, 0.0)]
CHANNELS = range(128, 257, 32)


def size(ffn: int, heads: int, depth: int) -> int:
    return 100 + depth * (3 * ffn + 40 * heads)


def test_costs_between_measured_places_are_on_the_line() -> None:
    assert target.cost(FFN, 192) == 0.1
    assert target.cost(FFN, 256) == 0.0
    assert target.cost(FFN, 160) == pytest.approx(0.25)
    assert target.cost(FFN, 240) == pytest.approx(0.025)


def combinations() -> list[tuple[float, int, int, int]]:
    return [
        (target.cost(FFN, f) + target.cost(HEADS, h) + target.cost(DEPTH, d), f, h, d)
        for f, (h, _), (d, _) in product(CHANNELS, HEADS, DEPTH)
    ]


@pytest.mark.parametrize("limit", [7500, 6800, 6000, 5000, 3500])
def test_a_size_is_met_at_the_least_cost(limit: int) -> None:
    best = min(kl for kl, *counts in combinations() if size(*counts) <= limit)
    found = target.choose(FFN, HEADS, DEPTH, CHANNELS, size, max_size=limit)
    assert found is not None
    assert found.kl == pytest.approx(best)
    assert found.size == size(found.ffn, found.heads, found.depth) <= limit


@pytest.mark.parametrize("limit", [0.0, 0.06, 0.2, 1.0])
def test_a_cost_is_kept_with_the_least_size(limit: float) -> None:
    best = min(size(*counts) for kl, *counts in combinations() if kl <= limit)
    found = target.choose(FFN, HEADS, DEPTH, CHANNELS, size, max_kl=limit)
    assert found is not None
    assert found.size == best
    assert found.kl <= limit


def test_what_cannot_be_reached_is_none() -> None:
    assert target.choose(FFN, HEADS, DEPTH, CHANNELS, size, max_size=100) is None
