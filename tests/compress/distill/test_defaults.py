import pytest

from llmpare.compress.distill import defaults


@pytest.mark.parametrize("parameters", [5_000_000, 8_000_000_000])
def test_the_more_a_student_knows_the_smaller_its_steps(parameters: int) -> None:
    """A new model, one that was pruned, and one whose codes are those of quantization already."""
    fresh = defaults.rate(parameters, healing=False)
    healing = defaults.rate(parameters, healing=True)
    rounded = defaults.rate(parameters, healing=True, rounded=True)
    assert fresh == pytest.approx(healing / defaults.HEALING) == pytest.approx(rounded / defaults.ROUNDED)
    assert rounded < healing < fresh
