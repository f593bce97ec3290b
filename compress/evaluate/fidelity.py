"""How far a model's predictions are from the original's, on text neither was fitted to.

For every scored position: the negative log-likelihood of the token that follows, under both models; the divergence
KL(dense ‖ compressed) of their predictions in nats; and whether their most likely tokens agree. Standard errors are
taken over windows, since positions of one window are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llmpare.compress.evaluate.request import TOP

RANGES = 32  # of positions, at most
_STRIP = 64  # positions whose probabilities exist at a time: new memory costs more than the sums over it
EDGES = (0.0, *(10 ** (quarter / 4) for quarter in range(-28, 9)))  # nats: a quarter of a decade each, 1e-7 … 100


@dataclass(frozen=True)
class Scores:
    """Per scored position, [windows, positions] each.

    dense_nll, compressed_nll, kl: nats. agree: same most likely token. top5: the share of the five most likely tokens
    that both have. dense_next, compressed_next: ids of the most likely tokens.
    """

    dense_nll: Tensor
    compressed_nll: Tensor
    kl: Tensor
    agree: Tensor
    top5: Tensor
    dense_next: Tensor
    compressed_next: Tensor

    @classmethod
    def join(cls, parts: "Sequence[Scores]", dim: int = 1) -> "Scores":
        """Consecutive positions (dim 1) of the same windows, or further windows (dim 0), together on the CPU."""
        columns = zip(*(part.tensors() for part in parts), strict=True)
        return cls(*(torch.cat(column, dim).cpu() for column in columns))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return tuple(vars(self)[each.name] for each in fields(self))


def score(dense: Tensor, compressed: Tensor, targets: Tensor) -> Scores:
    """Scores of float32 logits [windows, positions, vocabulary] for the token ids that follow, [windows, positions].

    Vocabularies must be equal. Works in place: `dense` holds its log-probabilities afterwards, `compressed` nothing
    of use.
    """
    dense_top, compressed_top = top(dense), top(compressed)
    p, q = log_softmax_(dense), log_softmax_(compressed)
    dense_nll, compressed_nll = nll(p, targets), nll(q, targets)
    difference = q.sub_(p).neg_()
    strips = zip(p.split(_STRIP, 1), difference.split(_STRIP, 1), strict=True)
    kl = torch.cat([torch.linalg.vecdot(a.exp(), b) for a, b in strips], 1)
    unsure = kl.isnan()
    if unsure.any():  # where p is 0 the term is 0, also if both logits are −inf
        weight = p[unsure].exp()
        kl[unsure] = torch.linalg.vecdot(weight, difference[unsure].masked_fill_(weight == 0, 0.0))
    return Scores(dense_nll, compressed_nll, kl, *agreement(dense_top, compressed_top))


def top(values: Tensor) -> Tensor:
    """Ids of the TOP most likely tokens, most likely first, of logits or log-probabilities [..., vocabulary]."""
    return values.topk(min(TOP, values.shape[-1])).indices


def agreement(dense: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """agree, top5, dense_next and compressed_next of Scores, from what `top` gives for either model."""
    shared = (dense.unsqueeze(-1) == compressed.unsqueeze(-2)).any(-1).float().mean(-1)
    dense_next, compressed_next = dense[..., 0].int(), compressed[..., 0].int()
    return dense_next == compressed_next, shared, dense_next, compressed_next


def log_softmax_(logits: Tensor) -> Tensor:
    """The log-probabilities, in the same memory."""
    return torch.log_softmax(logits, -1, out=logits)


def nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the targets [windows, positions] under [windows, positions, vocabulary]."""
    return log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).neg()


def summarise(parts: Sequence[Scores], dtype: str, scored_bytes: int | None = None) -> dict[str, Any]:
    """The report's `fidelity` section for all windows together.

    dtype: precision of the forwards. scored_bytes: what the scored tokens are as UTF-8, if it is known.
    """
    scores = Scores.join(parts, 0)
    dense, compressed = scores.dense_nll.double(), scores.compressed_nll.double()  # [windows, positions]
    kl, agree, top5 = scores.kl.double(), scores.agree.double(), scores.top5.double()
    before, after = perplexity(dense), perplexity(compressed)
    ordered = kl.flatten().sort().values
    return {
        "tokens": kl.numel(),
        "windows": len(kl),
        "dtype": dtype,
        "perplexity": {
            "dense": before,
            "compressed": after,
            "increase": after / before - 1,
            "increase_stderr": after / before * _stderr(compressed - dense),  # by pairs: the text is the same
            "dense_stderr": before * _stderr(dense),  # first order: d exp(x) = exp(x) dx
            "compressed_stderr": after * _stderr(compressed),
        },
        "kl": {
            "mean": float(kl.mean()),
            "stderr": _stderr(kl),
            "median": _quantile(ordered, 0.5),
            "p90": _quantile(ordered, 0.9),
            "p99": _quantile(ordered, 0.99),
            "max": float(ordered[-1]),
            "histogram": _histogram(kl),
        },
        "agreement": {"top1": float(agree.mean()), "top5": float(top5.mean()), "stderr": _stderr(agree)},
        "by_position": _by_position(kl, agree),
        "bits_per_byte": {
            "dense": _bits_per_byte(dense, scored_bytes),
            "compressed": _bits_per_byte(compressed, scored_bytes),
        },
    }


def alone(nlls: Tensor, dtype: str, scored_bytes: int | None = None) -> dict[str, Any]:
    """The same section for a model without a baseline. nlls: [windows, positions] of it."""
    values = nlls.double()
    found = perplexity(values)
    return {
        "tokens": values.numel(),
        "windows": len(values),
        "dtype": dtype,
        "perplexity": {
            "dense": None,
            "compressed": found,
            "increase": None,
            "increase_stderr": None,
            "dense_stderr": None,
            "compressed_stderr": found * _stderr(values),
        },
        "kl": None,
        "agreement": None,
        "by_position": [],
        "bits_per_byte": {"dense": None, "compressed": _bits_per_byte(values, scored_bytes)},
    }


def perplexity(nll: Tensor) -> float:
    """exp of the mean; infinite beyond all floats, NaN stays NaN."""
    mean = float(nll.mean())
    return math.inf if mean > 700 else math.exp(mean)  # a float ends at exp(709)


def _stderr(values: Tensor) -> float:
    """Standard error of the mean over windows; 0 for a single window, of which nothing can be said."""
    means = values.mean(1)
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else 0.0


def _quantile(ordered: Tensor, share: float) -> float:
    """By nearest rank: the least value that so large a share of all does not exceed."""
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _histogram(kl: Tensor) -> dict[str, list[float]]:
    """Counts between EDGES. The first and the last range take in what lies beyond, such as a divergence that rounding
    made a little less than 0; what is no number is not counted.
    """
    between = torch.tensor(EDGES[1:-1], dtype=torch.float64)
    bins = torch.bucketize(kl[~kl.isnan()], between, right=True)
    return {"edges": list(EDGES), "counts": torch.bincount(bins, minlength=len(EDGES) - 1).tolist()}


def _by_position(kl: Tensor, agree: Tensor) -> list[dict[str, Any]]:
    """Means over ranges of positions: position p is predicted from the p + 1 tokens of the window up to it."""
    count = kl.shape[1]
    bounds = [count * part // min(RANGES, count) for part in range(min(RANGES, count) + 1)]
    return [
        {"start": start, "end": end, "kl": float(kl[:, start:end].mean()), "top1": float(agree[:, start:end].mean())}
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]


def _bits_per_byte(nll: Tensor, scored_bytes: int | None) -> float | None:
    return float(nll.sum()) / math.log(2) / scored_bytes if scored_bytes else None
