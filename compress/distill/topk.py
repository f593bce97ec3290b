"""The k most likely tokens of a distribution, and all others as one bucket: what is kept of a teacher.

With p the teacher's probabilities, q the student's, T the tokens outside the k likeliest of p, P = Σ_T p and
Q = Σ_T q, a divergence over the k + 1 classes is what is left of the one over all tokens:

    KL(p ‖ q) = KL_buckets + P · KL(p_T / P ‖ q_T / Q)
    ∇_z KL    = q − p,  and of the buckets: q_i − p_i for the k likeliest, q_j − P · q_j / Q for the others

so the buckets never give more (data-processing inequality), and the gradients with respect to a token's logits differ
by P · (q_T / Q − p_T / P), whose absolute values sum to at most 2·P: twice the tail's mass.

Stored per token: ids as 16 low bits and, for vocabularies of more than 65536, as many high bits as they need, packed;
log-probabilities in half precision; the tail's in single. At k = 64 that is 260 bytes, and 276 for a vocabulary of
152064. What half precision rounds away, 2^-11 of every log-probability, is made up for when it is read: the k + 1
probabilities are made to sum to 1 again, the tail included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmpare.compress.formats.packing import pack, unpack

LEAST = -80.0  # log-probability below which a bucket counts as this likely: exp of it is still a float32
_LOW = 1 << 16


@dataclass(frozen=True)
class Kept:
    """ids int64 and near [tokens, k]: the likeliest tokens and their log-probabilities. tail [tokens]: of all others.

    Leading dimensions may be more. With k the whole vocabulary there is no tail: None.
    """

    ids: Tensor
    near: Tensor
    tail: Tensor | None

    def log_probabilities(self) -> Tensor:
        """The distribution over the buckets, float32 [tokens, k + 1] (or k without a tail), summing to 1."""
        every = self.near if self.tail is None else torch.cat([self.near, self.tail.unsqueeze(-1)], -1)
        return every.float().clamp(min=LEAST).log_softmax(-1)


def keep(logits: Tensor, k: int) -> Kept:
    """What is kept of float32 logits [..., vocabulary]. Overwrites them."""
    whole = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(k, logits.shape[-1]))
    tail = None
    if k < logits.shape[-1]:
        tail = (logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - whole).squeeze(-1)
    return Kept(ids, values - whole, tail)


def buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the buckets of `ids` [tokens, k] under logits [tokens, vocabulary]: float32 [tokens, k + 1].

    The last bucket is all tokens that are not in ids; it is left out when there are none. Differentiable in the
    logits, at the price of one more tensor of their size in either direction.
    """
    found: Tensor = _Buckets.apply(logits, ids)
    return found[..., :-1] if ids.shape[-1] == logits.shape[-1] else found


class _Buckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        rest = logits.float().scatter(-1, ids, -torch.inf)
        far = rest.logsumexp(-1, keepdim=True)
        near = logits.gather(-1, ids).float()
        whole = torch.logaddexp(near.logsumexp(-1, keepdim=True), far)
        ctx.save_for_backward(logits, ids, near, far, whole)
        return torch.cat([near - whole, far - whole], -1).clamp(min=LEAST)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """∂ near_i / ∂z = δ_i − q and ∂ far / ∂z = q_T / Q − q, with the gradients g_i and g_T of either."""
        logits, ids, near, far, whole = ctx.saved_tensors
        gradient = gradients[0]
        total = gradient.sum(-1, keepdim=True)
        share = gradient[..., -1:] - (far - whole).exp() * total  # of each token of the tail, in units of q_j / Q
        tail = (logits.float() - far.clamp(min=torch.finfo(torch.float32).min)).exp_().mul_(share)
        tail.scatter_(-1, ids, gradient[..., :-1] - (near - whole).exp() * total)
        return tail.to(logits.dtype), None


def encode(found: Kept, vocabulary: int) -> dict[str, Tensor]:
    """The tensors to store, of predictions [windows, tokens, k] over `vocabulary` tokens; on the CPU."""
    ids = found.ids.cpu()
    tensors = {"ids": ids.to(torch.int16), "near": found.near.cpu().half()}
    if found.tail is not None:
        tensors["tail"] = found.tail.cpu().float()
    bits = high_bits(vocabulary)
    if bits:
        rows = (ids // _LOW).reshape(-1, ids.shape[-1]).to(torch.uint8)
        tensors["ids_high"] = pack(rows, bits).reshape(*ids.shape[:-1], -1)
    return tensors


def decode(tensors: Mapping[str, Tensor], vocabulary: int) -> Kept:
    """The inverse of `encode`, but for the rounding of log-probabilities."""
    ids = tensors["ids"].long() & (_LOW - 1)
    bits = high_bits(vocabulary)
    if bits:
        words = tensors["ids_high"]
        high = unpack(words.reshape(-1, words.shape[-1]), bits, ids.shape[-1])
        ids += high.reshape(ids.shape).long() * _LOW
    return Kept(ids, tensors["near"].float(), tensors.get("tail"))


def high_bits(vocabulary: int) -> int:
    """Bits per id beyond the 16 low ones: 0, 1, 2, 4 or 8, widths that are unpacked fast."""
    needed = max(0, (vocabulary - 1).bit_length() - 16)
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


def token_bytes(k: int, vocabulary: int) -> int:
    """Bytes per token on disk."""
    return 4 * k + 4 + 4 * -(-k * high_bits(vocabulary) // 32)
