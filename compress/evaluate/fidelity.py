"""How far a model's predictions are from the original's, on text neither was fitted to.

For every scored position: the negative log-likelihood of the token that follows, under both models; the divergence
KL(dense ‖ compressed) of their predictions in nats; and whether their most likely tokens agree. Standard errors are
taken over windows, since positions of one window are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Per scored position, [windows, positions] each: nats for the first three, true or false for the last."""

    dense_nll: Tensor
    compressed_nll: Tensor
    kl: Tensor
    agree: Tensor

    @classmethod
    def join(cls, parts: "Sequence[Scores]") -> "Scores":
        """Consecutive positions of the same windows, put together on the CPU."""
        return cls(
            torch.cat([part.dense_nll for part in parts], 1).cpu(),
            torch.cat([part.compressed_nll for part in parts], 1).cpu(),
            torch.cat([part.kl for part in parts], 1).cpu(),
            torch.cat([part.agree for part in parts], 1).cpu(),
        )


def score(dense: Tensor, compressed: Tensor, targets: Tensor) -> Scores:
    """Scores of float32 logits [windows, positions, vocabulary] for the token ids that follow, [windows, positions].

    Vocabularies must be equal. Works in place on `dense` and `compressed`, which are of no use afterwards.
    """
    agree = dense.argmax(-1) == compressed.argmax(-1)
    p = dense.sub_(dense.logsumexp(-1, keepdim=True))
    q = compressed.sub_(compressed.logsumexp(-1, keepdim=True))
    index = targets.unsqueeze(-1)
    dense_nll = p.gather(-1, index).squeeze(-1).neg()
    compressed_nll = q.gather(-1, index).squeeze(-1).neg()
    divergence = torch.linalg.vecdot(p.exp(), q.sub_(p).neg_())
    return Scores(dense_nll, compressed_nll, divergence, agree)


def summarise(parts: Sequence[Scores], dtype: str) -> dict[str, Any]:
    """The report's `fidelity` section for all windows together. dtype: precision of the forwards."""
    dense = torch.cat([part.dense_nll.double() for part in parts])  # [windows, positions]
    compressed = torch.cat([part.compressed_nll.double() for part in parts])
    kl = torch.cat([part.kl.double() for part in parts])
    agree = torch.cat([part.agree.double() for part in parts])
    before, after = _perplexity(dense), _perplexity(compressed)
    ordered = kl.flatten().sort().values
    return {
        "tokens": kl.numel(),
        "windows": len(kl),
        "dtype": dtype,
        "perplexity": {
            "dense": before,
            "compressed": after,
            "increase": after / before - 1,
            "dense_stderr": before * _stderr(dense),  # first order: d exp(x) = exp(x) dx
            "compressed_stderr": after * _stderr(compressed),
        },
        "kl": {
            "mean": float(kl.mean()),
            "stderr": _stderr(kl),
            "median": _quantile(ordered, 0.5),
            "p99": _quantile(ordered, 0.99),
            "max": float(ordered[-1]),
        },
        "agreement": {"top1": float(agree.mean()), "stderr": _stderr(agree)},
    }


def _perplexity(nll: Tensor) -> float:
    mean = float(nll.mean())
    return math.inf if mean > 700 else math.exp(mean)  # a float ends at exp(709); NaN stays NaN


def _stderr(values: Tensor) -> float:
    """Standard error of the mean over windows; 0 for a single window, of which nothing can be said."""
    means = values.mean(1)
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else 0.0


def _quantile(ordered: Tensor, share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
