import json
import math

import pytest
import samples

from llmpare.compress.report import build


def test_size_section() -> None:
    section = build.size(
        source_bytes=1000, output_bytes=300, linear_bytes=206, parameters_total=500, parameters_compressed=400
    )
    assert section["ratio"] == pytest.approx(0.3)
    assert section["linear_bits_per_weight"] == pytest.approx(4.12)
    assert section["share_compressed"] == pytest.approx(0.8)


def test_size_section_when_every_linear_stays_dense() -> None:
    section = build.size(
        source_bytes=1000, output_bytes=1000, linear_bytes=0, parameters_total=500, parameters_compressed=0
    )
    assert section["linear_bits_per_weight"] is None
    assert section["share_compressed"] == 0


def test_encoding_is_strict_json_and_keeps_everything_finite() -> None:
    report = samples.report()
    assert json.loads(build.encode(report)) == report


def test_what_is_not_finite_becomes_null() -> None:
    encoded = build.encode({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf, "e": (True, "NaN")}})
    assert json.loads(encoded) == {"a": None, "b": [None, 1.5], "c": {"d": None, "e": [True, "NaN"]}}


def test_encoding_is_ascii_with_one_final_newline() -> None:
    encoded = build.encode({"name": "modèle\x1b[31m"})
    assert encoded.isascii()
    assert encoded.endswith(b"}\n")
    assert b"\x1b" not in encoded
