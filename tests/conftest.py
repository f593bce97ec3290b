"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    """A shell that runs the tests in the background ignores SIGINT, and so would every process that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
