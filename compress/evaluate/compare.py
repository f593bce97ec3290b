"""Two models that have read the same text, position by position; logits exist a few positions at a time."""

import torch
from torch import Tensor

from llmpare.compress.batches import logit_tokens
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate import baseline, fidelity
from llmpare.compress.evaluate.baseline import Saved, Saver, TopK
from llmpare.compress.evaluate.fidelity import Scores
from llmpare.compress.evaluate.stream import Reader, chunks


def scores(
    dense: Reader | Saved, compressed: Reader, ids: Tensor, device: torch.device, saver: Saver | None = None
) -> Scores:
    """What two models predict for ids [windows, tokens]; also handed to `saver`, what the dense one does.

    Vocabularies of different sizes are cut to the ids that both have.
    """
    found = []
    for windows, ranges in chunks(len(ids), ids.shape[1] - 1, logit_tokens(device.type)):
        parts, kept = [], []
        for start, end in ranges:
            targets = _targets(ids, windows, start, end, device)
            after = compressed.logits(windows, start, end)
            if isinstance(dense, Saved):
                after = after[..., : dense.identity.vocabulary].contiguous()
                parts.append(baseline.score(dense.part(windows, start, end, device), after, targets))
                continue
            before = dense.logits(windows, start, end)
            shared = min(before.shape[-1], after.shape[-1])
            if before.shape[-1] != after.shape[-1]:
                before, after = before[..., :shared].contiguous(), after[..., :shared].contiguous()
            parts.append(fidelity.score(before, after, targets))
            if saver is not None:
                kept.append(TopK.of(before, targets, saver.k))
        found.append(Scores.join(parts))
        if saver is not None:
            saver.add(_along_positions(kept))
    return Scores.join(found, 0)


def alone(model: Reader, ids: Tensor, device: torch.device, saver: Saver | None = None) -> Tensor:
    """The negative log-likelihoods [windows, positions] of a model without another to compare it with."""
    found = []
    for windows, ranges in chunks(len(ids), ids.shape[1] - 1, logit_tokens(device.type)):
        parts, kept = [], []
        for start, end in ranges:
            targets = _targets(ids, windows, start, end, device)
            p = fidelity.log_softmax_(model.logits(windows, start, end))
            parts.append(fidelity.nll(p, targets).cpu())
            if saver is not None:
                kept.append(TopK.of(p, targets, saver.k))
        found.append(torch.cat(parts, 1))
        if saver is not None:
            saver.add(_along_positions(kept))
    return torch.cat(found)


def _targets(ids: Tensor, windows: range, start: int, end: int, device: torch.device) -> Tensor:
    return ids[windows.start : windows.stop, start + 1 : end + 1].to(device)


def _along_positions(parts: list[TopK]) -> TopK:
    return TopK(*(torch.cat(column, 1) for column in zip(*(vars(part).values() for part in parts), strict=True)))


def where_not_finite(nll: Tensor) -> str:
    """The first place [windows, positions] that is no number, in words; '' if there is none."""
    places = (~nll.isfinite()).nonzero()
    if not len(places):
        return ""
    window, position = places[0].tolist()
    return f"window {window}, position {position}, and {len(places):,} of {nll.numel():,} positions in all"


def require_vocabulary(ids: Tensor, vocabulary: int, name: str) -> None:
    """Raises InputError for a text with ids beyond what the model knows."""
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"{name}: token id {int(ids.max())} is outside its vocabulary of {vocabulary}",
            "the models do not belong together",
        )
