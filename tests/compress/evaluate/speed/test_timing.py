import statistics

import numpy as np
import pytest

from llmpare.compress.evaluate.speed.timing import HostMarks, milliseconds, quantile, spread


def test_intervals_lie_between_marks() -> None:
    moments = iter([10.0, 10.5, 10.75, 12.0])
    clock = HostMarks(lambda: next(moments))
    assert clock.intervals() == []
    for _ in range(4):
        clock.mark()
    assert clock.intervals() == [0.5, 0.25, 1.25]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_quantile_is_numpys(count: int, share: float) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    assert quantile(values.tolist(), share) == pytest.approx(np.quantile(values, share))


def test_spread_is_the_distance_of_the_quartiles_over_the_median() -> None:
    values = [8.0, 9.0, 10.0, 11.0, 100.0]
    assert spread(values) == pytest.approx((11 - 9) / 10)
    assert spread([3.0]) == 0
    assert spread([2.0, 2.0]) == 0


def test_milliseconds() -> None:
    seconds = [0.001, 0.002, 0.004]
    found = milliseconds(seconds)
    assert found == {"median": pytest.approx(1000 * statistics.median(seconds)), "p90": pytest.approx(3.6)}
    assert milliseconds([]) is None
