"""Methods by name, with their options: what all registries of methods have in common. Imports no torch."""

import difflib
from collections.abc import Mapping
from typing import Protocol, TypeVar

from llmpare.compress.errors import UsageError


class Configurable(Protocol):
    """A line of a registry, as far as its options go."""

    @property
    def defaults(self) -> Mapping[str, float]:
        """Every option there is, with its default."""
        ...


_Line = TypeVar("_Line", bound=Configurable)


def find(methods: Mapping[str, _Line], name: str) -> _Line:
    """The method of that name. Raises UsageError with the nearest name and all there are."""
    if name not in methods:
        near = difflib.get_close_matches(name, methods, 1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown method {name!r}", f"{guess}--method takes one of {', '.join(methods)}")
    return methods[name]


def resolve(methods: Mapping[str, _Line], name: str, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """All options of the method, the given ones in place of the defaults, as sorted pairs.

    Raises UsageError for an unknown method, and for an option the method does not have.
    """
    defaults = find(methods, name).defaults
    for option in given:
        if option not in defaults:
            flag = "--" + option.replace("_", "-")
            owners = [m for m, method in methods.items() if option in method.defaults]
            near = difflib.get_close_matches(option, defaults, 1)
            hint = f"did you mean --{near[0].replace('_', '-')}? " if near else ""
            hint += f"{flag} belongs to {', '.join(owners)}; " if owners else ""
            takes = ", ".join("--" + o.replace("_", "-") for o in defaults) or "no options"
            raise UsageError(f"method {name} has no option {flag}", f"{hint}{name} takes {takes}")
    return tuple(sorted({**defaults, **given}.items()))
