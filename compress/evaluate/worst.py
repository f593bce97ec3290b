"""Where a compressed model differs most from the original, in words, and how it does by kind of text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmpare.compress.evaluate.fidelity import Scores, perplexity

WORST = 20
CONTEXT = 40  # tokens shown before the place


def contexts(scores: Scores, ids: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """The positions with the largest divergence, one per line of the report, largest first.

    ids: [windows, seqlen]. Each has the text before it, the token that really follows, and what either model finds
    most likely.
    """
    width = scores.kl.shape[1]
    flat = scores.kl.flatten().nan_to_num(nan=torch.inf)
    places = flat.topk(min(WORST, len(flat))).indices.tolist()
    found = []
    for place in places:
        window, position = divmod(place, width)
        before = ids[window, max(0, position + 1 - CONTEXT) : position + 1].tolist()
        found.append(
            {
                "kl": float(scores.kl[window, position]),
                "context": tokenizer.decode(before),
                "next": tokenizer.decode([int(ids[window, position + 1])]),
                "dense_next": tokenizer.decode([int(scores.dense_next[window, position])]),
                "compressed_next": tokenizer.decode([int(scores.compressed_next[window, position])]),
                "window": window,
                "position": position,
            }
        )
    return found


def domains(scores: Scores | Tensor, kind: Tensor, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """One row per kind of text; none if there is only one.

    scores: of both models, or the nll [windows, positions] of the only one. kind: for every token [windows, seqlen]
    an index into kinds; a position belongs to the kind of the token that it predicts.
    """
    followed = kind[:, 1:]
    rows = []
    for index, name in enumerate(kinds if len(kinds) > 1 else ()):
        here = followed == index
        if not here.any():
            continue
        row: dict[str, Any] = {"name": name or "other", "tokens": int(here.sum())}
        if isinstance(scores, Scores):
            before, after = (
                perplexity(scores.dense_nll[here].double()),
                perplexity(scores.compressed_nll[here].double()),
            )
            row["perplexity"] = {"dense": before, "compressed": after}
            row["kl"] = float(scores.kl[here].double().mean())
            row["top1"] = float(scores.agree[here].double().mean())
        else:
            row["perplexity"] = {"dense": None, "compressed": perplexity(scores[here].double())}
            row["kl"] = row["top1"] = None
        rows.append(row)
    return sorted(rows, key=lambda row: str(row["name"]))
