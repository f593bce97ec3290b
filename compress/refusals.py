"""What no command does to a model: run code of its own unasked, or write into its folder. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.files import destination, nested, shown
from llmpare.compress.errors import InputError, UsageError


def refuse_code(name: object, config: Mapping[str, Any], *, trusted: bool) -> None:
    """Raises InputError for a model that comes with its own code, unless that is trusted."""
    if "auto_map" in config and not trusted:
        raise InputError(
            f"{shown(name)}: config.json has an auto_map: this model runs code from the model folder",
            "read that code, then add --trust-remote-code",
        )


def refuse_nested(name: object, model: Path, out: Path) -> None:
    """Raises UsageError when the output would lie in the model's folder, or around it."""
    if nested(model.resolve(), destination(out)):
        raise UsageError(f"the output {out} and the model {name} lie inside each other", "choose another place with -o")
