"""How close a measurement comes to what the machine can move and compute.

A forward pass over `tokens` new tokens of each of `batch` sequences that have `context` tokens behind them reads the
weights once and the keys and values of the contexts, and multiplies and adds once per weight and token. What a
program moves besides (activations, masks, copies) counts against it. Williams et al., Roofline (2009).
"""

from collections.abc import Mapping
from typing import Any

from llmpare.compress.evaluate.speed.engine import Case, Work


def work(
    config: Mapping[str, Any],
    *,
    total: int,
    matrices: int,
    embedding: tuple[int, int],
    head: int | None,
    cache_bytes: int,
) -> Work:
    """What a decoder-only model moves and computes, from its text configuration and the sizes of its weights.

    total: bytes of all weights. matrices: numbers in all weights of two dimensions, as they multiply. embedding:
    numbers and bytes of the input embedding. head: numbers of the output head, None if it is the embedding.
    cache_bytes: bytes per number in the cache. Only `total` is known of a mixture of experts, and of a model whose
    dimensions go by other names.
    """
    layers, heads, hidden = (config.get(n) for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if any("expert" in name and value for name, value in config.items()) or not (layers and heads and hidden):
        return Work(total)
    width = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    numbers, stored = embedding
    return Work(
        weight_bytes=total,
        read_bytes=total - (0 if head is None else stored),
        body=matrices - numbers - (head or 0),
        head=numbers if head is None else head,
        kv_bytes=2 * layers * groups * width * cache_bytes,
        attention=2 * layers * heads * width,
    )


def passes(case: Case, *, decode: bool) -> list[tuple[int, int]]:
    """The forward passes that a case consists of: (new tokens, context before them) of each sequence."""
    if not decode:
        return [(case.prompt, 0)]
    if case.cache == "off":
        return [(case.prompt + step, 0) for step in range(1, case.new_tokens)]
    return [(1, case.prompt + step) for step in range(case.new_tokens - 1)]


def bytes_moved(work: Work, batch: int, tokens: int, context: int) -> float | None:
    """Bytes of one pass: weights, and keys and values of all tokens, read or written once."""
    if work.read_bytes is None or work.kv_bytes is None:
        return None
    return work.read_bytes + batch * (context + tokens) * work.kv_bytes


def operations(work: Work, batch: int, tokens: int, context: int) -> float | None:
    """Floating-point operations of one pass, two per multiply-add; the head is applied to the last token only."""
    if work.body is None or work.head is None or work.attention is None:
        return None
    pairs = tokens * context + tokens * (tokens + 1) / 2
    return 2.0 * batch * (tokens * work.body + work.head + pairs * work.attention)


def shares(
    work: Work, case: Case, seconds: float, *, decode: bool, machine: Mapping[str, Any]
) -> dict[str, float | None]:
    """Achieved over measured bandwidth and arithmetic; seconds: of all passes together. None: not known.

    A bandwidth share above 1 says that the weights came from a cache of the processor, not from memory.
    """
    each = passes(case, decode=decode)
    moved = [bytes_moved(work, case.batch, *one) for one in each]
    computed = [operations(work, case.batch, *one) for one in each]
    return {
        "bandwidth_share": _share(moved, seconds, machine["bandwidth_gb_s"]),
        "compute_share": _share(computed, seconds, machine["gflops"]),
    }


def _share(amounts: list[float | None], seconds: float, giga_per_second: float) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) / seconds / 1e9 / giga_per_second if len(known) == len(amounts) else None
