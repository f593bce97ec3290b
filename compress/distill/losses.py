"""How far a student's predictions are from its teacher's, per token; and the sum of that without holding all logits.

A divergence takes logits (or log-probabilities, which are logits too) of both models [tokens, vocabulary] and a
temperature, and gives one value per token [tokens], in nats. All are differentiable in the student's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 1024  # tokens whose logits exist at a time: enough for full speed of the head's product
_ELEMENTS = 2**23  # logits that a divergence looks at together: what it needs besides them stays this small
_LEAST = -1e4  # of a log-probability; its exp is 0 in every precision

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q), p the teacher's: covers all the teacher finds possible. Hinton et al. 2015."""
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q ‖ p) = Σ q (log q − log p): keeps to what the teacher finds likely. Gu et al. 2024 (MiniLLM)."""
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(beta: float) -> Divergence:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, 0 < β < 1. Agarwal et al. 2024 (GKD)."""

    def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        log_q, log_p = _log_probabilities(student, teacher, temperature)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_teacher, of_student = log_p.exp() * (log_p - log_m), log_q.exp() * (log_q - log_m)
        return (beta * of_teacher + (1 - beta) * of_student).sum(-1)

    return divergence


def total_variation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """½ Σ |p − q|, between 0 and 1: the share of tokens that sampling from the student would change."""
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """−log q of the token ids that really follow, [tokens]."""
    return student.logsumexp(-1) - student.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of logits that may be −inf: kept finite, their terms are 0 and not 0 · ∞."""
    pair = (torch.log_softmax(logits / temperature, -1).clamp_min(_LEAST) for logits in (student, teacher))
    log_q, log_p = pair
    return log_q, log_p


@dataclass(frozen=True)
class Objective:
    """What is minimised for a token: (1 − share) · T² · divergence + share · cross-entropy.

    T² keeps gradients as large as at T = 1. share: 0 learns from the teacher alone, 1 from the text alone.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    share: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, views: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Values [tokens] for the student's logits [tokens, vocabulary] and the ids that follow, [tokens].

        views(): what of the student is compared with what of the teacher, as logits of equal shape; not called when
        the text alone counts.
        """
        found = logits.new_zeros(len(logits))
        if self.share < 1:
            student, teacher = views()
            scale = (1 - self.share) * self.temperature**2
            found = found + scale * self.divergence(student, teacher, self.temperature)
        if self.share > 0:
            found = found + self.share * cross_entropy(logits, targets)
        return found


class Head(Protocol):
    """The way from last hidden states [tokens, width] to float32 logits [tokens, vocabulary]."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What gradients of the logits are to reach besides the hidden states."""
        ...

    def __call__(self, hidden: Tensor) -> Tensor: ...


LossOfRows = Callable[[Tensor, slice], Tensor]


def chunked(hidden: Tensor, head: Head, loss_of_rows: LossOfRows, chunk: int = CHUNK) -> Tensor:
    """Σ of the loss over all tokens, a scalar, with gradients for `hidden` [tokens, width] and the head's parameters.

    loss_of_rows(logits [rows, vocabulary], rows): the values [rows] of those tokens, a slice of all. Logits, and their
    gradient, exist for `chunk` tokens at a time: the gradient of a chunk is taken on the spot and passed through the
    head, so that the backward pass has only to scale what is there.
    """
    total: Tensor = _Chunked.apply(hidden, head, loss_of_rows, chunk, *head.parameters)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, loss_of_rows: LossOfRows, chunk: int, *parameters: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        into_hidden = torch.zeros_like(hidden)
        into_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(hidden), chunk):
            piece = hidden[start : start + chunk]
            value, found = _one(piece, head, parameters, loss_of_rows, start, wanted)
            total += value
            if wanted:
                into_hidden[start : start + chunk] = found[0]
                for sum_, part in zip(into_parameters, found[1:], strict=True):
                    sum_ += part
        ctx.save_for_backward(into_hidden, *into_parameters)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        into_hidden, *into_parameters = ctx.saved_tensors
        scaled = (each * grads[0].to(each.dtype) for each in (into_hidden, *into_parameters))
        first, *rest = scaled
        return first, None, None, None, *rest


def _one(
    hidden: Tensor, head: Head, parameters: tuple[Tensor, ...], loss_of_rows: LossOfRows, offset: int, wanted: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sum of the losses of a chunk, and its gradients for the hidden states and the head's parameters, if wanted.

    A function of its own, so that the logits are gone before there are others.
    """
    piece = hidden.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted):
        logits = head(piece)
    value, slope = _slope(logits.detach(), loss_of_rows, offset, wanted)
    if not wanted:
        return value, ()
    with torch.autocast(hidden.device.type, enabled=False):
        return value, torch.autograd.grad(logits, (piece, *parameters), slope)


def _slope(logits: Tensor, loss_of_rows: LossOfRows, offset: int, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses of a chunk, in float64, and its gradient for the chunk's logits."""
    slope = torch.empty_like(logits) if wanted else None
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    step = max(1, _ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = logits[start : start + step].requires_grad_(wanted)
        with torch.set_grad_enabled(wanted), torch.autocast(logits.device.type, enabled=False):
            loss = loss_of_rows(rows, slice(offset + start, offset + start + len(rows)))
            if slope is not None:
                slope[start : start + step] = torch.autograd.grad(loss.sum(), rows)[0]
        total += loss.detach().sum(dtype=torch.float64)
    return total, slope
