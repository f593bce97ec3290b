"""What holds for all tests."""

import signal
from pathlib import Path

import drawings
import pytest
import torch

from llmpare.compress.report.page import svg

DRAWN = Path(__file__).parent / "compress" / "report"


def pytest_configure() -> None:
    """A shell that runs the tests in the background ignores SIGINT, and so would every process that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def no_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without drawings, except where these are what is tested."""
    if DRAWN not in request.path.parents:
        monkeypatch.setattr(svg, "draw", drawings.blank)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """A test draws the same random numbers whichever ran before it."""
    torch.manual_seed(0)
