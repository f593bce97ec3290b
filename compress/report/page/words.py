"""Figures as a person would say them."""

import math

from markupsafe import Markup

from llmpare.compress.report import show

ABSENT = "–"


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def visible(value: object) -> object:
    """A text of the page with control codes and direction marks shown instead of obeyed; line breaks are kept."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c in "\n\u00a0" else show.printable(c) for c in value)


def tied(text: str) -> str:
    """text that keeps a percent sign on the line of its figure."""
    return text.replace(" %", "\u00a0%")


def change(share: float | None) -> str:
    """'+2.04 %', '−0.16 %'."""
    return show.percent(share, 2, signed=True).replace("-", "−")


def share(value: float | None, error: float | None = None, places: int = 2) -> str:
    """'94.38 % ± 0.31'."""
    if not finite(value) or not error or not finite(error):
        return show.percent(value, places)
    return f"{show.percent(value, places)} ± {100 * error:.{places}f}"


def perplexity(increase: float | None) -> str:
    """'2.0 % higher perplexity'."""
    if increase is None or not math.isfinite(increase):
        return "perplexity cannot be measured"
    if abs(increase) < 0.00005:
        return "the same perplexity"
    amount = abs(100 * increase)
    return f"{_amount(amount)} % {'higher' if increase > 0 else 'lower'} perplexity"


def _amount(amount: float) -> str:
    """A percentage with two figures that count: '0.16', '2.0', '43'."""
    if amount >= 9.95:
        return f"{amount:,.0f}"
    return f"{amount:.1f}" if amount >= 0.995 else f"{amount:.2f}"


def smaller(ratio: float) -> str:
    """ratio: bytes after over bytes before. '2.5 times smaller'."""
    if ratio <= 0:
        return "nothing left"
    if ratio < 0.995:
        return f"{1 / ratio:.1f} times smaller" if ratio < 0.8 else f"{_amount(100 * (1 - ratio))} % smaller"
    if ratio <= 1.005:
        return "the same size"
    return f"{ratio:.1f} times larger" if ratio >= 1.25 else f"{_amount(100 * (ratio - 1))} % larger"


def unchanged(top1: float | None) -> str:
    """The share of agreement in words: 'the same next token 94.4 % of the time'."""
    if not finite(top1):
        return "agreement cannot be measured"
    return f"the same next token {show.percent(top1)} of the time"


def one_in(top1: float | None) -> str:
    """'1 token in 18 differs'."""
    if top1 is None or not math.isfinite(top1):
        return "cannot be measured"
    if top1 >= 1:
        return "no token differs"
    return (
        f"1 token in {1 / (1 - top1):,.0f} differs" if top1 > 0.5 else f"{show.percent(1 - top1, 0)} of tokens differ"
    )


def listed(phrases: list[str]) -> str:
    """'a, b and c'."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def counted(number: int, noun: str) -> str:
    """'1 gate', '3 gates'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sentence(text: str) -> str:
    """text as a sentence: a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
