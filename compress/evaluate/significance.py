"""Whether two models that answered the same documents differ by more than luck.

The exact sign test (Dixon and Mood 1946): of n documents on which the models differ, the number that one of them wins
is binomial(n, ½) if neither is better. On answers that are right or wrong that is McNemar's test in its exact form
(1947); on graded ones only the direction of a difference counts, not its size, so the test needs no assumption about
how grades are distributed, and no random draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Flips:
    """Documents on which the candidate does worse than the baseline, and better: right→wrong and wrong→right where
    an answer is either. p_value: of the two-sided sign test; 1 when no document differs.
    """

    lost: int
    gained: int
    p_value: float


def flips(candidate: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool) -> Flips:
    """The flips between two models' values for the same documents in the same order.

    A value that is not a number is worse than any number. Raises ValueError when the lengths differ.
    """
    pairs = [(_rank(c, higher_is_better), _rank(b, higher_is_better)) for c, b in zip(candidate, baseline, strict=True)]
    lost = sum(new < old for new, old in pairs)
    gained = sum(new > old for new, old in pairs)
    return Flips(lost, gained, sign_test(lost, gained))


def sign_test(lost: int, gained: int) -> float:
    """P(a split at least as uneven | both outcomes equally likely), two-sided: min(1, 2 P(X ≤ min)), X ~ B(n, ½)."""
    n = lost + gained
    ways = tail = 1  # to win k of n documents, and to win at most k; whole numbers, since 2⁻ⁿ is no float for long
    for k in range(min(lost, gained)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def _rank(value: float, higher_is_better: bool) -> float:
    """The value on a scale where more is better."""
    if math.isnan(value):
        return -math.inf
    return value if higher_is_better else -value
