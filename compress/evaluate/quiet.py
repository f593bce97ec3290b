"""What a talkative library says: its output dropped, its warnings kept."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


class Notes(logging.Handler):
    """What a library warns of, once for each place in its code: such warnings come by the document."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._found: dict[object, tuple[str, int]] = {}

    def add(self, message: str, place: object = None) -> None:
        first, count = self._found.get(place or message, (message, 0))
        self._found[place or message] = first, count + 1

    def emit(self, record: logging.LogRecord) -> None:
        self.add(" ".join(record.getMessage().split()), (record.pathname, record.lineno))

    def messages(self) -> tuple[str, ...]:
        return tuple(first if n == 1 else f"{first} ({n} times)" for first, n in self._found.values())

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Takes notes meanwhile of what the library of that name says."""
        library = logging.getLogger(name)
        library.addHandler(self)
        try:
            yield
        finally:
            library.removeHandler(self)


@contextmanager
def silence() -> Iterator[None]:
    """Sends nowhere what libraries print and draw meanwhile: stdout and stderr are the command line's."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
