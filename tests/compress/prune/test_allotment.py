import itertools

import pytest

from llmpare.compress.prune.allotment import POINTS, Part, allot, around


def part(weights: int, height: float, growth: float, points: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)) -> Part:
    """One whose cost grows by this factor with every tenth of sparsity."""
    return Part(weights, {point: height * growth ** (10 * point) for point in points})


def mean(parts: list[Part], shares: list[float]) -> float:
    total = sum(each.weights for each in parts)
    return sum(each.weights * share for each, share in zip(parts, shares, strict=True)) / total


def cost(parts: list[Part], shares: list[float]) -> float:
    return sum(each.cost(share) for each, share in zip(parts, shares, strict=True))


@pytest.mark.parametrize("wanted", [0.35, 0.5, 0.62])
def test_no_other_allotment_on_a_grid_costs_less(wanted: float) -> None:
    parts = [part(100, 1.0, 1.5), part(300, 0.2, 2.0), part(50, 5.0, 1.8)]
    shares = allot(parts, wanted)
    assert mean(parts, shares) == pytest.approx(wanted, abs=1e-9)
    steps = [0.3 + 0.01 * i for i in range(41)]
    others = [list(each) for each in itertools.product(steps, repeat=3) if abs(mean(parts, list(each)) - wanted) < 1e-3]
    assert len(others) > 10
    assert cost(parts, shares) <= min(cost(parts, each) for each in others) * 1.01


def test_parts_that_are_alike_get_alike() -> None:
    assert allot([part(10, 1.0, 2.0)] * 4, 0.5) == pytest.approx([0.5] * 4, abs=0.01)


def test_what_is_dear_stays_within_what_was_measured() -> None:
    shares = allot([part(10, 1000.0, 2.0), part(10, 1e-6, 2.0)], 0.5)
    assert shares == pytest.approx([0.3, 0.7])


def test_a_part_that_costs_nothing() -> None:
    assert allot([part(10, 1.0, 2.0), Part(10, dict.fromkeys((0.3, 0.5, 0.7), 1e-30))], 0.5) == pytest.approx(
        [0.3, 0.7]
    )


def test_one_part_gets_it_all() -> None:
    assert allot([part(10, 1.0, 2.0)], 0.42) == [0.42]


def test_curves_go_through_what_was_measured() -> None:
    curve = Part(1, {0.3: 1.0, 0.5: 4.0, 0.7: 64.0})
    assert [curve.cost(at) for at in (0.3, 0.4, 0.5, 0.6, 0.7)] == pytest.approx([1, 2, 4, 16, 64])


@pytest.mark.parametrize("at", [0.01, 0.05, 0.5, 0.95, 0.99])
def test_points_to_measure(at: float) -> None:
    points = around(at)
    assert at in points
    assert 2 <= len(points) <= len(POINTS)
    assert points[0] >= 0.01
    assert points[-1] <= 0.99
