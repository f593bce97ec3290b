"""Settings → the frozen request that the library works on."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmpare.cli import values
from llmpare.cli.settings import METHOD_OPTIONS, Settings, canonical, check_names, required
from llmpare.compress.errors import UsageError
from llmpare.compress.evaluate.request import EvaluateRequest, SpeedRequest, TasksRequest, TextRequest
from llmpare.compress.quantize import resolve
from llmpare.compress.request import (
    BUNDLED,
    Gates,
    LayerRule,
    QuantizeRequest,
    Scheme,
    TextSpec,
    parse_scheme,
)

RULE_PARSERS = {
    "match": values.text,
    "scheme": values.text,
    "bits": values.whole,
    "group-size": values.group_size,
    "asym": values.flag,
    "dense": values.flag,
}


def quantize_request(settings: Settings, out: Path | None = None) -> QuantizeRequest:
    """What to do, from settings of `llmpare quantize` or `llmpare plan`.

    out: where the output goes when the settings do not say; None makes that an error. Raises UsageError for
    missing, unknown and contradicting settings.
    """
    model = required(settings, "model", "MODEL")
    if out is None or "out" in settings:
        out = Path(required(settings, "out", "-o OUT"))
    scheme = parse_scheme(
        settings.get("scheme"),
        bits=settings.get("bits"),
        group_size=settings.get("group-size"),
        symmetric=_symmetric(settings),
    )
    method = _method(settings)
    options = {name.replace("-", "_"): settings[name] for name in METHOD_OPTIONS if name in settings}
    ignored = tuple(LayerRule(regex(pattern, "--ignore"), None) for pattern in settings.get("ignore", ()))
    seqlen = settings.get("seqlen")
    return QuantizeRequest(
        model=model,
        out=out,
        scheme=scheme,
        method=method,
        options=resolve(method, options),
        format=settings.get("format", "compressed-tensors"),
        rules=ignored + tuple(_rule(entry, scheme) for entry in settings.get("layers", ())),
        calibration=TextSpec(
            dataset=settings.get("dataset", BUNDLED),
            nsamples=settings.get("nsamples"),
            seqlen=seqlen,
            chat_template=settings.get("chat-template", False),
        ),
        evaluation=TextSpec(
            dataset=settings.get("eval-dataset", BUNDLED),
            nsamples=settings.get("eval-nsamples"),
            seqlen=seqlen,
        ),
        device=settings.get("device", "auto"),
        dtype=settings.get("dtype", "auto"),
        seed=settings.get("seed", 0),
        max_memory=settings.get("max-memory"),
        revision=settings.get("revision"),
        trust_remote_code=settings.get("trust-remote-code", False),
        allow_nonfinite=settings.get("allow-nonfinite", False),
        route_all=settings.get("route-all", False),
        gates=gates(settings),
        strict=settings.get("strict", False),
        force=settings.get("force", False),
        restart=settings.get("restart", False),
    )


def evaluate_request(settings: Settings) -> EvaluateRequest:
    """What to do, from settings of `llmpare evaluate`. Raises UsageError for missing and contradicting settings."""
    required(settings, "models", "MODEL")
    if "text" in settings and "eval-dataset" in settings:
        raise UsageError("--text and --eval-dataset are both the text to measure on", "give one of the two")
    if "top-k" in settings and "save-baseline" not in settings:
        raise UsageError("--top-k belongs to --save-baseline", "leave it out, or add --save-baseline FOLDER")
    datasets = settings.get("text") or (settings.get("eval-dataset", BUNDLED),)
    return EvaluateRequest(
        models=settings["models"],
        baseline=settings.get("baseline"),
        out=_path(settings, "out"),
        text=TextRequest(datasets, settings.get("nsamples"), settings.get("seqlen")),
        save_baseline=_path(settings, "save-baseline"),
        tasks=_tasks(settings),
        speed=_speed(settings),
        gates=gates(settings),
        junit=_path(settings, "junit"),
        against=_path(settings, "against"),
        device=settings.get("device", "auto"),
        dtype=settings.get("dtype", "auto"),
        max_memory=settings.get("max-memory"),
        revision=settings.get("revision"),
        trust_remote_code=settings.get("trust-remote-code", False),
        strict=settings.get("strict", False),
        **given(settings, {"top-k": "top_k"}),
    )


def _tasks(settings: Settings) -> TasksRequest | None:
    options = given(settings, {"limit": "limit", "num-fewshot": "num_fewshot", "task-batch-size": "batch_size"})
    if "include" in settings:
        options["include"] = Path(settings["include"])
    if "tasks" in settings:
        return TasksRequest(settings["tasks"], **options)
    if options:
        raise UsageError("--limit, --num-fewshot, --include and --task-batch-size belong to --tasks", "name some tasks")
    return None


def _speed(settings: Settings) -> SpeedRequest | None:
    names = ("engines", "batch-sizes", "prompt-lengths", "variations", "new-tokens", "repeats")
    options = given(settings, {name: name.replace("-", "_") for name in names})
    if settings.get("speed"):
        return SpeedRequest(**options)
    if options:
        name = next(iter(options)).replace("_", "-")
        raise UsageError(f"--{name} belongs to --speed", "add --speed, or leave it out")
    return None


def gates(settings: Settings) -> Gates:
    """The limits that are given."""
    return Gates(**given(settings, {field.name.replace("_", "-"): field.name for field in fields(Gates)}))


def given(settings: Settings, names: Mapping[str, str]) -> dict[str, Any]:
    """The settings that are given, under the names that a request has for them."""
    return {field: settings[name] for name, field in names.items() if name in settings}


def _path(settings: Settings, name: str) -> Path | None:
    return Path(settings[name]) if name in settings else None


def beside(model: str) -> Path:
    """Where a plan without -o assumes the output: beside the model, so that its disk is the one looked at."""
    return Path(os.path.abspath(model) + "-compressed")


def _method(settings: Settings) -> str:
    method: str = settings.get("method", "tuned" if settings.get("best") else "gptq")
    if settings.get("best") and method != "tuned":
        raise UsageError(f"--best contradicts --method {method}", "--best is short for --method tuned; give one")
    return method


def _symmetric(settings: Mapping[str, Any]) -> bool | None:
    return not settings["asym"] if "asym" in settings else None


def _rule(entry: Mapping[str, object], base: Scheme) -> LayerRule:
    """One entry of `layers:` in the config file; what it leaves open is as in the run's own scheme."""
    entry = {canonical(name): value for name, value in entry.items()}
    where = f"layers, match {entry.get('match')!r}"
    check_names(entry, RULE_PARSERS, where)
    try:
        parsed: dict[str, Any] = {name: RULE_PARSERS[name](value) for name, value in entry.items()}
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if "match" not in parsed:
        raise UsageError("layers: an entry has no 'match'", "write '- match: REGEX' and what holds for those layers")
    pattern = regex(parsed.pop("match"), where)
    if parsed.pop("dense", False):
        if parsed:
            raise UsageError(f"{where}: 'dense' leaves nothing to set, yet it has {', '.join(parsed)}")
        return LayerRule(pattern, None)
    if not parsed:
        raise UsageError(f"{where}: nothing is set", "give scheme, bits, group-size or asym, or 'dense: true'")
    named = "scheme" in parsed
    symmetric = _symmetric(parsed)
    return LayerRule(
        pattern,
        parse_scheme(
            parsed.get("scheme"),
            bits=parsed.get("bits", None if named else base.bits),
            group_size=parsed.get("group-size", base.group_size),
            symmetric=base.symmetric if symmetric is None and not named else symmetric,
        ),
    )


def regex(pattern: str, where: str) -> str:
    """The pattern, if it is a regular expression; other tools mark one by 're:', which no name of a linear has."""
    pattern = pattern.removeprefix("re:")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    return pattern
