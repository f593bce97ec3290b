import math
from collections.abc import Callable

import pytest

from llmpare.cli import values

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("16GiB", 16 * GIB), ("4GB", 4 * 10**9), ("4 gb", 4 * 10**9), ("4G", 4 * 10**9), ("1.5MiB", 1_572_864),
        ("500000", 500_000), (500_000, 500_000), ("2kB", 2000), ("1TiB", 2**40), (" 3 B ", 3),
    ],
)  # fmt: skip
def test_sizes(written: object, count: int) -> None:
    assert values.size(written) == count


@pytest.mark.parametrize(
    ("written", "fraction"),
    [("2%", 0.02), ("0.02", 0.02), (0.02, 0.02), ("97 %", 0.97), ("100%", 1.0), ("250%", 2.5), ("0", 0.0), (0, 0.0)],
)
def test_shares(written: object, fraction: float) -> None:
    assert values.share(written) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("parse", "written"),
    [
        *((values.size, bad) for bad in ("", "GB", "-1GB", "1e9", "12 potatoes", "0", "1,5GB", None, True, [1], "nan")),
        # A bare 2 could be 2 % or 200 %, a bare 97 is a forgotten sign: neither is guessed at.
        *((values.share, bad) for bad in ("2", 97, "1", 1.0, "-1%", "nan%", "inf", "%", "two%", True, None)),
        *((values.limit, bad) for bad in ("-0.1", "nan", "inf", "x", True, None, [0.1])),
        *((values.whole, bad) for bad in ("4.0", 4.5, "four", True, None, "")),
        *((values.positive, bad) for bad in ("0", -1)),
        *((values.flag, bad) for bad in ("yes", 1, None)),
        *((values.text, bad) for bad in ("", None, True, ["a"], {})),
        *((values.path, bad) for bad in ("--force", "-o", "")),
        *((values.device, bad) for bad in ("gpu", "cuda:", "cpu:0", "CUDA", 0)),
        *((values.dtype, bad) for bad in ("int8", "bf16", 16)),
        *((values.mappings, bad) for bad in ({"match": "x"}, ["x"], "x")),
    ],
)
def test_what_is_refused(parse: Callable[[object], object], written: object) -> None:
    with pytest.raises(ValueError, match="^expected "):
        parse(written)


def test_numbers() -> None:
    assert values.number("1e-3") == 0.001
    assert math.isclose(values.limit("0.05"), 0.05)


def test_lists() -> None:
    assert values.texts("a") == ("a",)
    assert values.texts(["a", "b"]) == ("a", "b")
    assert values.mappings([{"match": "x", 1: 2}]) == ({"match": "x", "1": 2},)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices(name: str) -> None:
    assert values.device(name) == name
