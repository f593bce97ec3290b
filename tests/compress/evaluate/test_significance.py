"""The sign test against counting every way the differences could have fallen."""

import itertools
import math

import pytest

from llmpare.compress.evaluate.significance import Flips, flips, sign_test


def by_counting(lost: int, gained: int) -> float:
    """The share of all 2^n ways to call n differences for one model or the other that are at least as uneven."""
    outcomes = list(itertools.product((-1, 1), repeat=lost + gained))
    return sum(abs(sum(outcome)) >= abs(gained - lost) for outcome in outcomes) / len(outcomes)


@pytest.mark.parametrize(("lost", "gained"), [(a, b) for a in range(7) for b in range(7)])
def test_every_outcome_counted(lost: int, gained: int) -> None:
    assert sign_test(lost, gained) == pytest.approx(by_counting(lost, gained), rel=1e-15)


def test_published_value() -> None:
    """McNemar's exact test for 5 against 15 discordant pairs, as in textbooks: 0.0414."""
    assert sign_test(5, 15) == pytest.approx(0.04138947, rel=1e-6)
    assert sign_test(15, 5) == sign_test(5, 15)


def test_no_difference_is_no_evidence() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(8, 8) == 1


def test_thousands_of_flips_neither_overflow_nor_vanish() -> None:
    assert sign_test(5000, 5000) == 1
    assert 0 < sign_test(400, 600) < 1e-9
    normal = math.erfc((100 - 1) / math.sqrt(10_000) / math.sqrt(2))  # with the correction for continuity
    assert sign_test(4950, 5050) == pytest.approx(normal, rel=1e-3)


def test_flips_of_answers_right_or_wrong() -> None:
    candidate = [1, 1, 0, 0, 0, 0, 1]
    baseline_ = [1, 0, 1, 1, 1, 0, 1]
    assert flips(candidate, baseline_, higher_is_better=True) == Flips(3, 1, sign_test(3, 1))
    assert flips(baseline_, candidate, higher_is_better=True) == Flips(1, 3, sign_test(3, 1))
    assert flips(candidate, candidate, higher_is_better=True) == Flips(0, 0, 1)


def test_flips_of_grades() -> None:
    candidate, baseline = [0.2, 0.5, 0.9], [0.1, 0.5, 1.0]
    assert flips(candidate, baseline, higher_is_better=True) == Flips(1, 1, 1)
    assert flips([3.0, 4.0, 5.0], [2.0, 3.0, 4.0], higher_is_better=False) == Flips(3, 0, 0.25)


def test_not_a_number_is_a_loss() -> None:
    for better in (True, False):
        assert flips([math.nan], [0.0], higher_is_better=better) == Flips(1, 0, 1)
        assert flips([math.nan], [math.nan], higher_is_better=better) == Flips(0, 0, 1)
        assert flips([0.0], [math.nan], higher_is_better=better) == Flips(0, 1, 1)


def test_other_documents_are_no_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        flips([1.0], [1.0, 0.0], higher_is_better=True)
