import pytest
import torch

from llmpare.compress import devices
from llmpare.compress.evaluate.speed import machine


def test_it_counts_the_bytes_and_operations_of_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program takes two seconds by this clock."""
    monkeypatch.setitem(machine._LARGE, "cpu", 4000)
    monkeypatch.setitem(machine._ORDER, "cpu", 10)
    monkeypatch.setattr(machine, "_best", lambda program, device: 2.0)
    found = machine.measure(torch.device("cpu"), torch.bfloat16)
    assert found["bandwidth_gb_s"] == pytest.approx(3 * 4000 / 2 / 1e9)  # the triad, which has three streams
    assert found["gflops"] == pytest.approx(2 * 10**3 / 2 / 1e9)
    assert (found["device"], found["dtype"]) == (devices.name(torch.device("cpu")), "bfloat16")


def test_the_best_of_several_repetitions_counts_after_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    durations = iter([0.3, 0.1, 0.2])

    class Clock:
        def mark(self) -> None:
            pass

        def intervals(self) -> list[float]:
            return [next(durations)]

    monkeypatch.setattr(machine, "marks", lambda device: Clock())
    assert machine._best(lambda: ran.append(1), torch.device("cpu")) == 0.1
    assert len(ran) == 4
