"""What can go wrong in a way that the user can act on.

Every error says what happened, where and why in its message, and what to do about it in its hint.
The exit code of each class is decided by the command line, not here.
"""


class LlmpareError(Exception):
    """Base of all errors that are not bugs of ours.

    message: what happened, where, and why. hint: what to do about it, one sentence, may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LlmpareError):
    """The command line or the config file asks for something that does not exist or does not fit together."""


class InputError(LlmpareError):
    """A model, a text or a partial output that cannot be used as it is."""


class UnsupportedError(InputError):
    """A model of a kind that cannot be worked on block by block."""


class GateError(LlmpareError):
    """The work is done and published, but an accuracy gate (or --strict) rejects it."""


class OutputError(LlmpareError):
    """The output cannot be written where it was asked for."""


class MemoryLimitError(LlmpareError):
    """The work does not fit into the memory there is, or into the memory it was allowed."""


class BusyError(LlmpareError):
    """Another run is working on the same output."""
