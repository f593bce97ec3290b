"""What holds for all tests."""

import signal
from pathlib import Path

import drawings
import pytest

from llmpare.compress.report.page import svg

DRAWN = Path(__file__).parent / "compress" / "report"


def pytest_configure() -> None:
    """A shell that runs the tests in the background ignores SIGINT, and so would every process that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without drawings, except where these are what is tested."""
    if DRAWN not in request.path.parents:
        monkeypatch.setattr(svg, "draw", drawings.blank)
