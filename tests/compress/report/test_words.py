import math

import pytest

from llmpare.compress.report.page import words
from llmpare.compress.report.page.looks import Look
from llmpare.compress.report.page.plots import number


@pytest.mark.parametrize(
    ("increase", "said"),
    [
        (0.0204, "2.0 % higher perplexity"),
        (-0.0016, "0.16 % lower perplexity"),
        (0.43, "43 % higher perplexity"),
        (12.0, "1,200 % higher perplexity"),
        (0.00996, "1.0 % higher perplexity"),
        (0.0, "the same perplexity"),
        (math.nan, "perplexity cannot be measured"),
        (None, "perplexity cannot be measured"),
    ],
)
def test_perplexity(increase: float | None, said: str) -> None:
    assert words.perplexity(increase) == said


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0.393, "2.5 times smaller"),
        (0.9, "10 % smaller"),
        (1.0, "the same size"),
        (1.1, "10 % larger"),
        (2.0, "2.0 times larger"),
        (0.0, "nothing left"),
    ],
)
def test_size(ratio: float, said: str) -> None:
    assert words.smaller(ratio) == said


@pytest.mark.parametrize(
    ("top1", "said"),
    [
        (0.9438, "1 token in 18 differs"),
        (1.0, "no token differs"),
        (0.3, "70 % of tokens differ"),
        (None, "cannot be measured"),
    ],
)
def test_agreement(top1: float | None, said: str) -> None:
    assert words.one_in(top1) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (0.0006, "0.0006"),
        (1e-5, "10⁻⁵"),
        (2e-5, "2·10⁻⁵"),
        (4000.0, "4,000"),
        (1e7, "10⁷"),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_ticks(value: float, said: str) -> None:
    assert number(value) == said


def test_what_would_act_is_shown_and_what_is_markup_stays() -> None:
    assert words.visible("a\x1b\u202e\nb\u00a0%") == "a\\x1b\\u202e\nb\u00a0%"
    assert words.visible(3) == 3


def test_the_first_models_all_look_different_with_and_without_colours() -> None:
    looks = [Look.of(index) for index in range(32)]
    assert len(set(looks)) == 32
    assert len({(look.dash, look.marker) for look in looks[:8]}) == 8
