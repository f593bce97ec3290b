"""Flags and the config file as one set of settings.

Both hold the same names and go through the same parsers; a flag wins over the file. snake_case is accepted for
kebab-case, and so are the names that other tools taught people to type.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmpare.cli import values
from llmpare.compress.errors import UsageError
from llmpare.compress.quantize import METHODS

Settings = Mapping[str, Any]

ALIASES = {
    "groupsize": "group-size",
    "learning-rate": "lr",
    "max-seq-length": "seqlen",
    "num-calibration-samples": "nsamples",
    "output": "out",
    "output-dir": "out",
    "percdamp": "damping",
    "wbits": "bits",
}

METHOD_OPTIONS = tuple(sorted({option.replace("_", "-") for method in METHODS.values() for option in method.defaults}))

Parsers = Mapping[str, Callable[[object], Any]]

# What every command that runs a model takes.
_RUN: Parsers = {
    "nsamples": values.positive,
    "seqlen": values.positive,
    "device": values.device,
    "dtype": values.dtype,
    "max-memory": values.size,
    "revision": values.text,
    "trust-remote-code": values.flag,
    "max-kl": values.limit,
    "max-perplexity-increase": values.share,
    "min-agreement": values.share,
    "max-size": values.size,
    "strict": values.flag,
    "json": values.flag,
    "quiet": values.flag,
    "no-color": values.flag,
}

# What every command that writes a checkpoint takes besides.
_COMPRESS: Parsers = {
    **_RUN,
    "model": values.path,
    "out": values.path,
    "format": values.text,
    "ignore": values.texts,
    "dataset": values.path,
    "chat-template": values.flag,
    "eval-dataset": values.path,
    "eval-nsamples": values.positive,
    "seed": values.whole,
    "allow-nonfinite": values.flag,
    "dry-run": values.flag,
    "force": values.flag,
    "restart": values.flag,
}

QUANTIZE: Parsers = {
    **_COMPRESS,
    "scheme": values.text,
    "bits": values.whole,
    "group-size": values.group_size,
    "asym": values.flag,
    "method": values.text,
    "best": values.flag,
    "damping": values.limit,
    "rounds": values.natural,
    "sweeps": values.natural,
    "correction": values.strength,
    "steps": values.natural,
    "step-size": values.limit,
    "layers": values.mappings,
    "desc-act": values.flag,
    "route-all": values.flag,
}

PRUNE: Parsers = {
    **_COMPRESS,
    "sparsity": values.share,
    "pattern": values.text,
    "allocation": values.text,
    "method": values.text,
    "refit": values.flag,
    "damping": values.limit,
    "iterations": values.natural,
    "then": values.text,
    "group-size": values.group_size,
    "ffn": values.share,
    "heads": values.share,
    "hidden": values.share,
    "layers": values.positive,
    "drop-layers": values.numbers,
    "experts": values.positive,
    "round-to": values.positive,
    "target-params": values.count,
    "target-size": values.size,
}

DISTILL: Parsers = {
    **{name: parse for name, parse in _COMPRESS.items() if name not in ("model", "nsamples", "ignore")},
    "teacher": values.path,
    "student": values.path,
    "student-ffn": values.share,
    "student-heads": values.share,
    "student-hidden": values.share,
    "student-layers": values.positive,
    "student-config": values.path,
    "tokens": values.count,
    "batch-tokens": values.count,
    "lr": values.limit,
    "warmup": values.whole,
    "loss": values.text,
    "beta": values.share,
    "temperature": values.limit,
    "text-share": values.share,
    "hidden-loss": values.text,
    "hidden-weight": values.limit,
    "lora-rank": values.positive,
    "gradient-checkpointing": values.flag,
    "teacher-dtype": values.dtype,
    "cache-teacher": values.path,
    "on-policy": values.share,
    "early-exit": values.numbers,
    "student-scheme": values.text,
    "group-size": values.group_size,
    "save-steps": values.positive,
}

EVALUATE: Parsers = {
    **_RUN,
    "models": values.paths,
    "baseline": values.path,
    "out": values.path,
    "text": values.paths,
    "eval-dataset": values.path,
    "save-baseline": values.path,
    "top-k": values.positive,
    "tasks": values.names,
    "limit": values.positive,
    "num-fewshot": values.whole,
    "include": values.path,
    "task-batch-size": values.positive,
    "speed": values.flag,
    "engines": values.names,
    "batch-sizes": values.positives,
    "prompt-lengths": values.positives,
    "variations": values.names,
    "new-tokens": values.positive,
    "repeats": values.positive,
    "min-recovery": values.share,
    "min-tokens-per-second": values.limit,
    "junit": values.path,
    "against": values.path,
}

# Commands that look at a folder and run nothing.
LOOK: Parsers = {"json": values.flag, "quiet": values.flag, "no-color": values.flag}


def canonical(name: str) -> str:
    """The name of a flag or config key as this program spells it."""
    name = name.replace("_", "-")
    return ALIASES.get(name, name)


def collect(params: Mapping[str, object], parsers: Parsers) -> Settings:
    """The settings of one command: its parameters by Python name, over the file that `config` names, if any.

    parsers: for every name the command, or the one whose file it shares, has. A parameter that was not given is None
    or an empty list. Raises UsageError for values that cannot be read, and for a config file that is missing, is not
    YAML, or has keys that do not exist.
    """
    given = {canonical(name): value for name, value in params.items() if value not in (None, ()) and value != []}
    config = given.pop("config", None)
    if config is None:
        return _parse(given, "--", parsers)
    from llmpare.cli import config_file

    written = config_file.read(Path(str(config)))
    check_names(written, parsers, str(config))
    return _parse(written, f"{config}: ", parsers) | _parse(given, "--", parsers)


def required(settings: Settings, name: str, how: str) -> str:
    """The setting, or a UsageError that says how to give it."""
    if name not in settings:
        raise UsageError(f"missing {how}", f"give it on the command line, or as '{name}:' in the file of --config")
    return str(settings[name])


def check_names(names: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise UsageError for the first name that is not valid, with what was probably meant."""
    valid = list(valid)
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            meant = f"did you mean '{close[0]}'? " if close else ""
            raise UsageError(f"{where}: there is no '{name}'", f"{meant}valid: {', '.join(valid)}")


def _parse(raw: Mapping[str, object], prefix: str, parsers: Parsers) -> dict[str, Any]:
    parsed = {}
    for name, value in raw.items():
        try:
            parsed[name] = parsers[name](value)
        except ValueError as error:
            place = "MODEL" if prefix == "--" and name in ("model", "models") else f"{prefix}{name}"
            raise UsageError(f"{place}: {error}, got {value!r}") from None
    return parsed
