"""What may be asked, and how shares become numbers."""

from typing import Any

import pytest

from llmpare.compress.errors import UsageError
from llmpare.compress.prune.cut import Cut, rounded


@pytest.mark.parametrize(
    ("count", "share", "multiple", "expected"),
    [
        (14336, 0.75, 128, 10752),
        (768, 0.75, 128, 640),  # 576, and up
        (768, 1.0, 128, 768),
        (700, 1.0, 128, 700),  # never more than there is
        (100, 0.99, 128, 100),
        (8, 0.75, 1, 6),
        (10, 0.3, 1, 3),  # 0.3 · 10 is not quite 3 in floating point
        (768, None, 128, 768),
        (64, 0.001, 1, 1),
    ],
)
def test_shares_are_rounded_up_to_the_multiple(count: int, share: float, multiple: int, expected: int) -> None:
    assert rounded(count, share, multiple) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ffn": 0.0}, "--ffn 0 is no share"),
        ({"heads": 1.5}, "--heads 1.5 is no share"),
        ({"hidden": -1.0}, "--hidden -1 is no share"),
        ({"layers": 0}, "--layers must be more than 0"),
        ({"round_to": 0}, "--round-to must be more than 0"),
        ({"max_kl": float("nan")}, "--max-kl must be more than 0"),
        ({"layers": 3, "drop_layers": (1,)}, "contradict"),
        ({"target_params": 5, "target_size": 5}, "several targets"),
        ({"target_params": 5, "ffn": 0.5}, "--ffn says it"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Cut(**settings)


def test_what_was_given_is_known() -> None:
    assert Cut(ffn=0.5, drop_layers=(3,)).explicit == ["--ffn", "--drop-layers"]
    assert not Cut(ffn=0.5).searched
    assert Cut(target_size=1000).searched
