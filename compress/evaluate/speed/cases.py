"""Which cases are measured: one base, and variations of it one at a time, never the full product."""

from collections.abc import Sequence
from dataclasses import replace

from llmpare.compress.evaluate.speed.engine import Case

PROMPTS = (128, 512)  # tokens
NEW_TOKENS = 32
REPEATS = 5
REQUESTS = 16  # of continuous batching
LARGEST = 2**20  # sequences; a growing series ends far earlier

# Name of a variation → what it changes about the base.
VARIATIONS: dict[str, dict[str, object]] = {
    "static": {"cache": "static"},
    "off": {"cache": "off"},
    "compiled": {"cache": "static", "compiled": True},
    "eager": {"attention": "eager"},
    "flash_attention_2": {"attention": "flash_attention_2"},
    "continuous": {"continuous": True, "cache": "paged", "batch": REQUESTS},
}


def choose(
    base: Case, variations: Sequence[str], *, batches: Sequence[int] | None, prompts: Sequence[int], batched: bool
) -> list[Case]:
    """The cases for one engine, cheap ones first and the growing batch last, where running out of memory costs least.

    base: the engine's own settings. batches: None doubles from 1 until memory ends. batched: whether the engine can
    run more than one sequence at once.
    """
    smallest = min(batches) if batches else 1
    first = replace(base, batch=smallest if batched else 1, prompt=prompts[0])
    longer = [replace(first, prompt=prompt) for prompt in prompts[1:]]
    varied = [replace(first, **VARIATIONS[name]) for name in variations]  # type: ignore[arg-type]
    sizes: Sequence[int] = sorted(set(batches)) if batches else [2**power for power in range(LARGEST.bit_length())]
    grown = [replace(first, batch=size, growing=True) for size in sizes if batched and size != first.batch]
    return list(dict.fromkeys([first, *longer, *varied, *grown]))
