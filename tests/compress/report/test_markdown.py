import math
import re

import pytest
import samples

from llmpare.compress.report import headline, markdown, schema


def _tables(page: str) -> list[list[str]]:
    return [table.strip().splitlines() for table in re.findall(r"(?:^\|.*\n?)+", page, flags=re.MULTILINE)]


def test_the_verdict_comes_first() -> None:
    page = markdown.render(samples.report())
    head = page.split("## ")[0]
    for fact in (
        "Passed",
        "11.5 MB",
        "4.54 MB",
        "39.3 %",
        "58.29 ± 0.41",
        "58.41 ± 0.42",
        "+0.21 %",
        "95.91 % ± 0.09 %",
    ):
        assert fact in head, fact
    assert "0.002860 ± 0.000040" in head
    assert "4.126" in head


def test_everything_a_report_holds_is_on_the_page() -> None:
    page = markdown.render(samples.report())
    for fact in (
        "`model.layers.0.mlp.down_proj`", "not positive definite", "damping raised to 0.1", "## Gates", "max-kl",
        "evaluation text is in the calibration text", "tied to the embedding", "`bundled`", "It was a dark night.",
        "8 × 512", "640 MB", "compressing", "W4A16 g128", "2.13.0", "from_pretrained(OUT)", "`out/w4`",
        "| memory | 700 MB | 640 MB | -8.6 % |", "| 4,544,000 bytes | 4,544,000 bytes | nothing |",
        "| 7.2 s | 7.9 s | +9.7 % |",
    ):  # fmt: skip
        assert fact in page, fact


def test_a_failed_run_says_so() -> None:
    report = samples.report()
    report["passed"] = False
    report["gates"][0]["passed"] = False
    page = markdown.render(report)
    assert "**Not passed.**" in page
    assert "**failed**" in page


def test_sections_that_would_be_empty_are_left_out() -> None:
    report = samples.report()
    report["gates"] = report["fallbacks"] = report["warnings"] = report["kept_dense"] = []
    page = markdown.render(report)
    assert not re.search("## (Gates|Fallbacks|Warnings|Left dense)", page)
    assert "\n\n\n" not in page


HOSTILE = "\x1b[2J|x| `tick` <img src=x> [/x](http://e) **bold**\n# title\u202e"


def test_hostile_names_stay_data() -> None:
    """Row 18 of the fault table, for the page: names are shown, never acted on."""
    report = samples.report()
    report["request"]["model"] = report["request"]["out"] = HOSTILE
    report["calibration"]["first_line"] = report["calibration"]["dataset"] = HOSTILE
    report["fallbacks"] = [{"name": HOSTILE, "cause": HOSTILE, "action": HOSTILE}]
    report["warnings"] = [HOSTILE]
    report["kept_dense"] = [{"name": HOSTILE, "why": HOSTILE}]
    report["blocks"][0]["linears"][0]["name"] = HOSTILE
    page = markdown.render(report)
    assert all(line.isprintable() for line in page.splitlines())
    assert "\n# title" not in page
    outside_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", page)
    for mark in ("<img", "[/x]", "**bold"):
        assert not re.search(r"(?<!\\)" + re.escape(mark), outside_code), mark


@pytest.mark.parametrize("name", ["plain", HOSTILE])
def test_every_row_of_a_table_has_as_many_cells_as_its_head(name: str) -> None:
    report = samples.report()
    report["fallbacks"][0]["name"] = report["fallbacks"][0]["cause"] = name
    report["calibration"]["first_line"] = name
    for table in _tables(markdown.render(report)):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(widths) == 1, table


def test_a_run_without_calibration_text() -> None:
    report = samples.report()
    report["calibration"] = None
    assert schema.validate(report) == []
    page = markdown.render(report)
    assert "| evaluation |" in page
    assert "| calibration |" not in page


def test_what_is_not_finite_is_said_in_words() -> None:
    report = samples.report()
    report["fidelity"]["perplexity"]["compressed"] = math.nan
    report["fidelity"]["kl"]["mean"] = None
    report["size"]["linear_bits_per_weight"] = None
    page = markdown.render(report)
    assert "not finite" in page
    assert "nan" not in page.lower().replace("nano", "")


@pytest.mark.parametrize(
    ("format", "symmetric", "bits", "served", "dequantized"),
    [
        ("compressed-tensors", True, 4, True, False),
        ("compressed-tensors", False, 4, True, True),
        ("gptq", True, 4, True, False),
        ("gptq", True, 3, False, False),
        ("gptq", False, 4, False, False),
        ("dense", True, 4, True, False),
    ],
)
def test_loading_says_only_what_readers_accept(
    format: str, symmetric: bool, bits: int, served: bool, dequantized: bool
) -> None:
    report = samples.report()
    report["request"] |= {"format": format, "scheme": {"bits": bits, "group_size": 128, "symmetric": symmetric}}
    page = markdown.render(report)
    assert ("vllm serve" in page) == served
    assert ("dequantize=True" in page) == dequantized


def test_the_headline_is_ascii_and_has_the_figures() -> None:
    text = "\n".join(headline.lines(samples.report()))
    assert text.isascii()
    for fact in ("11.5 MB -> 4.54 MB", "58.29 -> 58.41", "0.002860", "95.91 %", "fallback", "max-kl"):
        assert fact in text, fact


def test_the_headline_counts_fallbacks_instead_of_listing_hundreds() -> None:
    report = samples.report()
    report["fallbacks"] *= 200
    text = headline.lines(report)
    assert len(text) < 15
    assert any("200" in line for line in text)
