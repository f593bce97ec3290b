import pytest

from llmpare.compress.evaluate.speed.growth import Growth


def test_the_model_is_all_that_is_known_at_first() -> None:
    assert Growth(loaded=100, room=100, seconds=0).refuses(2) == ""
    assert Growth(loaded=101, room=100, seconds=0).refuses(2) != ""


def test_what_a_batch_takes_on_top_of_the_model_grows_with_it() -> None:
    growth = Growth(loaded=2**30, room=2**30 + 800, seconds=60)
    growth.record(1, 2**30 + 100, 1)
    assert growth.refuses(8) == ""
    assert "of the 1.0 GiB allowed" in growth.refuses(9)


def test_a_device_that_knows_when_it_is_full_is_not_predicted() -> None:
    growth = Growth(loaded=0, room=None, seconds=60)
    growth.record(1, 2**60, 1)
    assert growth.refuses(2) == ""


@pytest.mark.parametrize(("last", "refused"), [(9.0, False), (11.0, True)])
def test_time_ends_it(last: float, refused: bool) -> None:
    growth = Growth(loaded=0, room=None, seconds=30)
    growth.record(1, 0, 500, counts=False)
    growth.record(2, 0, last)
    assert bool(growth.refuses(4)) is refused
    assert ("--batch-sizes" in growth.refuses(4)) is refused
