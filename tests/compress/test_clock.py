import pytest

from llmpare.compress import clock
from llmpare.compress.clock import Clock


@pytest.fixture
def pass_time(monkeypatch):
    """A function that lets seconds go by; no others do."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return sleep


def test_phases_of_one_name_add_up(pass_time) -> None:
    timer = Clock()
    for seconds in (1.0, 2.5):
        with timer.phase("solve"):
            pass_time(seconds)
        pass_time(10)
    with timer.phase("pack"):
        pass_time(4)
    assert timer.seconds == {"solve": 3.5, "pack": 4.0}
    assert timer.total() == 27.5


def test_a_phase_inside_another_counts_for_itself_only(pass_time) -> None:
    timer = Clock()
    with timer.phase("outer"):
        pass_time(1)
        with timer.phase("inner"):
            pass_time(2)
            with timer.phase("innermost"):
                pass_time(4)
            pass_time(8)
        pass_time(16)
        with timer.phase("inner"):
            pass_time(32)
    assert timer.seconds == {"innermost": 4.0, "inner": 42.0, "outer": 17.0}
    assert sum(timer.seconds.values()) == timer.total()


def test_a_phase_inside_its_own_kind_is_counted_once(pass_time) -> None:
    timer = Clock()
    with timer.phase("read"):
        pass_time(1)
        with timer.phase("read"):
            pass_time(2)
    assert timer.seconds == {"read": 3.0}


def test_a_phase_that_fails_is_counted_and_the_next_one_is_not_nested_in_it(pass_time) -> None:
    timer = Clock()

    def fail() -> None:
        with timer.phase("outer"):
            pass_time(1)
            with timer.phase("inner"):
                pass_time(2)
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    with timer.phase("after"):
        pass_time(4)
    assert timer.seconds == {"inner": 2.0, "outer": 1.0, "after": 4.0}


def test_work_a_device_still_owes_is_counted_where_it_was_asked_for(pass_time) -> None:
    owed = [5.0]

    def synchronise() -> None:
        pass_time(owed[0])
        owed[0] = 0.0

    timer = Clock(synchronise)
    with timer.phase("solve"):  # what was owed before it began is not its own
        pass_time(1)
        owed[0] = 7.0
    with timer.phase("pack"):
        pass_time(2)
    assert timer.seconds == {"solve": 8.0, "pack": 2.0}


def test_a_clock_runs_from_when_it_is_made(pass_time) -> None:
    timer = Clock()
    assert timer.seconds == {}
    pass_time(3)
    assert timer.total() == 3
    assert Clock().total() == 0
