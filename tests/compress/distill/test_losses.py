"""The losses against float64 textbook versions, and what they hold in memory."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmpare.compress.distill import losses
from llmpare.compress.distill.losses import Divergence, Objective, chunked

TOKENS, WIDTH, VOCABULARY = 11, 6, 17


def textbook(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """One token after the other, by the definitions, in float64."""
    found = []
    for s, t in zip(student.double(), teacher.double(), strict=True):
        q, p = (x.exp() / x.exp().sum() for x in (s / temperature, t / temperature))
        m = 0.3 * p + 0.7 * q
        found.append(
            {
                "forward": (p * (p / q).log()).sum(),
                "reverse": (q * (q / p).log()).sum(),
                "jsd": 0.3 * (p * (p / m).log()).sum() + 0.7 * (q * (q / m).log()).sum(),
                "variation": (p - q).abs().sum() / 2,
            }[name]
        )
    return torch.stack(found)


DIVERGENCES: dict[str, Divergence] = {
    "forward": losses.forward_kl,
    "reverse": losses.reverse_kl,
    "jsd": losses.jsd(0.3),
    "variation": losses.total_variation,
}


class Matrix:
    """A head that is one trained matrix."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.weight.requires_grad else ()

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.t()


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of a student and of a teacher, and what follows."""
    generator = torch.Generator().manual_seed(seed)
    hidden, own = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    head, other = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    return hidden, head, own, other, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [4, 100])
def test_chunked_losses_equal_the_textbook_with_gradients(
    name: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_ELEMENTS", 3 * VOCABULARY)  # three tokens at a time within a chunk
    hidden, head, own, other, targets = case()
    a, b = hidden.clone().requires_grad_(), nn.Parameter(head.clone())
    objective = Objective(DIVERGENCES[name], temperature, share=0.25)
    found = chunked(
        a,
        Matrix(b),
        lambda logits, rows: objective(logits, targets[rows], lambda: (logits, own[rows] @ other.t())),
        chunk,
    )
    (2 * found).backward()

    x, w = hidden.double().requires_grad_(), head.double().requires_grad_()
    logits = x @ w.t()
    entropy = torch.stack([-torch.log_softmax(row, 0)[id_] for row, id_ in zip(logits, targets, strict=True)])
    parts = textbook(name, logits, (own @ other.t()).double(), temperature)
    expected = 0.75 * temperature**2 * parts.sum() + 0.25 * entropy.sum()
    (2 * expected).backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad.double(), x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.grad.double(), w.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_predictions_lose_nothing_and_pull_nowhere(name: str) -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = DIVERGENCES[name](logits, logits.detach(), 1.0).sum()
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_that_neither_model_allows_count_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(5, VOCABULARY, generator=generator) for _ in range(2))
    shorter = DIVERGENCES[name](student[:, :-2], teacher[:, :-2], 1.0)
    student[:, -2:] = teacher[:, -2:] = -math.inf
    student.requires_grad_()
    found = DIVERGENCES[name](student, teacher, 1.0)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), shorter)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_text_alone_needs_no_teacher() -> None:
    hidden, head, _, _, targets = case()

    def refuse() -> tuple[Tensor, Tensor]:
        raise AssertionError

    found = Objective(share=1.0)(hidden @ head.t(), targets, refuse)
    torch.testing.assert_close(found, nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="none"))


def test_a_head_that_is_not_trained_gets_no_gradient_and_an_empty_batch_is_nothing() -> None:
    hidden, head, own, other, targets = case()
    hidden.requires_grad_()
    objective = Objective()

    def rows(logits: Tensor, where: slice) -> Tensor:
        return objective(logits, targets[where], lambda: (logits, own[where] @ other.t()))

    chunked(hidden, Matrix(head), rows).backward()
    assert hidden.grad is not None
    assert head.grad is None
    assert float(chunked(hidden[:0], Matrix(head), rows).detach()) == 0.0


class Largest(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, from the sizes that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(  # type: ignore[override]
        self, function: Callable[..., object], types: object, args: object = (), kwargs: dict[str, object] | None = None
    ) -> object:
        import weakref

        found = function(*args, **(kwargs or {}))  # type: ignore[misc]
        for each in tree_iter(found):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                key = storage._cdata
                if key not in self._alive:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return found


@pytest.mark.parametrize("name", DIVERGENCES)
def test_two_chunks_of_logits_exist_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens there are: what else is there is the hidden states and the head."""
    tokens, chunk, vocabulary = 160, 40, 2048
    monkeypatch.setattr(losses, "_ELEMENTS", vocabulary)  # what a divergence needs for one token at a time
    generator = torch.Generator().manual_seed(0)
    hidden, own = (torch.randn(tokens, WIDTH, generator=generator) for _ in range(2))
    head, other = (torch.randn(vocabulary, WIDTH, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    objective = Objective(DIVERGENCES[name])
    with Largest() as largest:
        loss = chunked(
            hidden,
            Matrix(nn.Parameter(head)),
            lambda logits, rows: objective(logits, logits[:, 0], lambda: (logits, own[rows] @ other.t())),
            chunk,
        )
        loss.backward()
    logits = 4 * vocabulary * chunk
    besides = 4 * (3 * head.numel() + 4 * hidden.numel()) + 24 * 4 * vocabulary
    assert 2 * logits <= largest.peak <= 2 * logits + besides
