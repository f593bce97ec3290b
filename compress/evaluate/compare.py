"""Two models that have read the same text, position by position; logits exist a few positions at a time."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from llmpare.compress.batches import logit_tokens
from llmpare.compress.evaluate import baseline, fidelity
from llmpare.compress.evaluate.baseline import Saved, Saver, TopK
from llmpare.compress.evaluate.fidelity import Scores
from llmpare.compress.evaluate.stream import Reader, chunks

_Found = TypeVar("_Found")


Part = Callable[[range, int, int, Tensor], tuple[_Found, Tensor | None]]
"""(windows, start, end, targets) → what is found at these positions, and what a Saver keeps: log-probabilities."""


def scores(
    dense: Reader | Saved, compressed: Reader, ids: Tensor, device: torch.device, saver: Saver | None = None
) -> Scores:
    """What two models predict for ids [windows, tokens]; also handed to `saver`, what the dense one does.

    Vocabularies of different sizes are cut to the ids that both have.
    """

    def part(windows: range, start: int, end: int, targets: Tensor) -> tuple[Scores, Tensor | None]:
        after = compressed.logits(windows, start, end)
        if isinstance(dense, Saved):
            after = after[..., : dense.identity.vocabulary].contiguous()
            return baseline.score(dense.part(windows, start, end, device), after, targets), None
        before = dense.logits(windows, start, end)
        shared = min(before.shape[-1], after.shape[-1])
        if before.shape[-1] != after.shape[-1]:
            before, after = before[..., :shared].contiguous(), after[..., :shared].contiguous()
        return fidelity.score(before, after, targets), before

    return Scores.join([Scores.join(parts) for parts in _everywhere(part, ids, device, saver)], 0)


def alone(model: Reader, ids: Tensor, device: torch.device, saver: Saver | None = None) -> Tensor:
    """The negative log-likelihoods [windows, positions] of a model without another to compare it with."""

    def part(windows: range, start: int, end: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        p = fidelity.log_softmax_(model.logits(windows, start, end))
        return fidelity.nll(p, targets).cpu(), p

    return torch.cat([torch.cat(parts, 1) for parts in _everywhere(part, ids, device, saver)])


def _everywhere(part: Part[_Found], ids: Tensor, device: torch.device, saver: Saver | None) -> list[list[_Found]]:
    """What is found in every group of windows, by ranges of positions."""
    found = []
    for windows, ranges in chunks(len(ids), ids.shape[1] - 1, logit_tokens(device.type)):
        parts, kept = [], []
        for start, end in ranges:
            targets = ids[windows.start : windows.stop, start + 1 : end + 1].to(device)
            result, predicted = part(windows, start, end, targets)
            parts.append(result)
            if saver is not None and predicted is not None:
                kept.append(TopK.of(predicted, targets, saver.k))
        found.append(parts)
        if saver is not None:
            saver.add(TopK.join(kept, 1))
    return found


def where_not_finite(nll: Tensor) -> str:
    """The first place [windows, positions] that is no number, in words; '' if there is none."""
    places = (~nll.isfinite()).nonzero()
    if not len(places):
        return ""
    window, position = places[0].tolist()
    return f"window {window}, position {position}, and {len(places):,} of {nll.numel():,} positions in all"
