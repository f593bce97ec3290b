import math

import pytest

from llmpare.compress.report import show


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, with ümlauts and 漢字", "plain text, with ümlauts and 漢字"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\nlines\r\ttab", "two\\nlines\\r\\ttab"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("right\u202eleft", "right\\u202eleft"),
        ("line\u2028separator", "line\\u2028separator"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("not UTF-8: \udcff", "not UTF-8: \\udcff"),
        ("[/x] [int4] {}", "[/x] [int4] {}"),
    ],
)
def test_printable_escapes_what_a_terminal_would_act_on(text: str, shown: str) -> None:
    assert show.printable(text) == shown
    assert show.printable(text).isprintable()


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (4_537_000, "4.54 MB"),
        (999_700_000, "1000 MB"),
        (16_060_522_496, "16.1 GB"),
        (2_000_000_000_000, "2 TB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert show.size(count) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (58.294, "58.29"),
        (0.00286, "0.002860"),
        (1234.5, "1234"),
        (0.00004, "0.00004000"),
        (1e-12, "1.000e-12"),
        (0.0, "0"),
    ]
    + [(value, "not finite") for value in (math.nan, math.inf, None)],
)
def test_figure(value: float | None, shown: str) -> None:
    assert show.figure(value) == shown


def test_percent() -> None:
    assert show.percent(0.9591) == "95.9 %"
    assert show.percent(0.00206, 2, signed=True) == "+0.21 %"
    assert show.percent(math.nan) == show.percent(None) == "not finite"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0.0 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert show.duration(seconds) == shown


def test_count() -> None:
    assert [show.count(n) for n in (950, 5_770_752, 8_030_261_248)] == ["950", "5.77 M", "8.03 B"]


def test_an_error_is_shown_where_there_is_one() -> None:
    assert show.with_error(177.36, 20.0) == "177.4 ± 20"
    assert show.with_error(177.36, 0.0) == show.with_error(177.36, None) == "177.4"
    assert show.with_error(None, math.nan) == "not finite"
