"""What can be refused before anything is loaded; imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from llmpare.compress.errors import UsageError
from llmpare.compress.evaluate.speed import cases
from llmpare.compress.evaluate.speed import engines as registry


def check(
    model: Path,
    engines: Sequence[str],
    *,
    batches: Sequence[int] | None = None,
    prompts: Sequence[int] = cases.PROMPTS,
    new_tokens: int = cases.NEW_TOKENS,
    repeats: int = cases.REPEATS,
    variations: Sequence[str] | None = None,
) -> None:
    """The arguments of `measure`. Raises UsageError for numbers that measure nothing and for engines and variations
    that are not there, InputError for a checkpoint that does not suit an engine.
    """
    if not engines:
        raise UsageError("no engine to time", f"--engines takes {', '.join(registry.ENGINES)}")
    for name in engines:
        registry.find(name, model)
    unknown = [name for name in variations or () if name not in cases.VARIATIONS]
    if unknown:
        raise UsageError(f"unknown variation {unknown[0]!r}", f"there are {', '.join(cases.VARIATIONS)}")
    if not prompts or min(prompts) < 1:
        raise UsageError("no prompt of at least one token", "--prompt-lengths takes numbers from 1")
    if batches is not None and (not batches or min(batches) < 1):
        raise UsageError("no batch of at least one sequence", "--batch-sizes takes numbers from 1")
    if new_tokens < 2:
        raise UsageError(f"--new-tokens {new_tokens}: the first token belongs to the prompt", "use at least 2")
    if repeats < 1:
        raise UsageError(f"--repeats {repeats} measures nothing", "use at least 1")
