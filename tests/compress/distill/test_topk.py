"""What is kept of a teacher, against the divergence over all tokens in float64."""

import pytest
import torch
from torch import Tensor

from llmpare.compress.distill import topk

TOKENS, VOCABULARY = 6, 50


def logits(seed: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Of a teacher and a student."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(TOKENS, vocabulary, generator=generator)
    return teacher, teacher + torch.randn(TOKENS, vocabulary, generator=generator)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) per row of two log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1, VOCABULARY, 2 * VOCABULARY])
def test_buckets_are_those_of_the_textbook(k: int) -> None:
    teacher, student = logits(0)
    kept = topk.keep(teacher.clone(), k)
    for row, of_row in enumerate(teacher.double().softmax(-1)):
        order = sorted(range(VOCABULARY), key=lambda i: -float(of_row[i]))[:k]
        assert kept.ids[row].tolist() == order
        rest = [i for i in range(VOCABULARY) if i not in order]
        for model, found in (
            (of_row, kept.log_probabilities()[row]),
            (student[row].double().softmax(-1), topk.buckets(student, kept.ids)[row]),
        ):
            expected = [float(model[i]) for i in order] + ([float(sum(model[i] for i in rest))] if rest else [])
            assert found.exp().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1, VOCABULARY])
def test_gradients_through_the_buckets_are_those_of_autograd_in_float64(k: int) -> None:
    teacher, student = logits(1)
    ids = topk.keep(teacher.clone(), k).ids
    weight = torch.randn(TOKENS, min(k + 1, VOCABULARY))
    student.requires_grad_()
    (topk.buckets(student, ids) * weight).sum().backward()

    exact = student.detach().double().requires_grad_()
    q = exact.log_softmax(-1)
    parts = [q.gather(-1, ids)]
    if k < VOCABULARY:
        parts.append(q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True))
    (torch.cat(parts, -1) * weight).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, exact.grad, check_dtype=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [2, 10, 30])
@pytest.mark.parametrize("seed", range(3))
def test_what_the_tail_hides_is_its_mass_times_its_own_divergence(seed: int, k: int) -> None:
    """The identity and the bound on the gradients at the top of topk.py, also after what is stored is rounded."""
    teacher, student = logits(seed)
    stored = topk.encode(topk.keep(teacher.clone(), k), VOCABULARY)
    kept = topk.decode(stored, VOCABULARY)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, kept.ids, False)
    inside = kl(p[tail].view(TOKENS, -1).log_softmax(-1), q[tail].view(TOKENS, -1).log_softmax(-1))
    mass = (p.exp() * tail).sum(-1)
    student.requires_grad_()
    found = kl(kept.log_probabilities(), topk.buckets(student, kept.ids))
    # half precision moves a log-probability by 2^-11 of itself: p·|log p| of that in probability, entropy of it in KL
    rounding = 2**-11 * (p.exp() * p.abs()).sum(-1)
    assert bool(((found.double() + mass * inside - kl(p, q)).abs() <= 10 * rounding).all())

    found.sum().backward()
    assert student.grad is not None
    difference = (student.grad.double() - (q.exp() - p.exp())).abs().sum(-1)
    assert bool((difference <= 2 * mass + 2 * rounding).all())
    assert bool((difference > 0).all())


@pytest.mark.parametrize("vocabulary", [300, 65536, 65537, 152064, 2**20])
def test_ids_of_any_vocabulary_come_back_within_the_bytes_stated(vocabulary: int) -> None:
    k = 64
    windows, tokens = 2, 3
    ids = torch.randint(0, vocabulary, (windows, tokens, k))
    ids[0, 0, 0] = vocabulary - 1
    kept = topk.Kept(ids, -torch.rand(windows, tokens, k), -torch.rand(windows, tokens))
    stored = topk.encode(kept, vocabulary)
    found = topk.decode(stored, vocabulary)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.near, kept.near, rtol=2**-11, atol=0)
    size = sum(tensor.nbytes for tensor in stored.values())
    assert size == windows * tokens * topk.token_bytes(k, vocabulary)
    assert topk.token_bytes(k, vocabulary) <= 320


def test_tokens_that_are_ruled_out_leave_finite_numbers_and_no_gradient_beyond_them() -> None:
    teacher, student = logits(2)
    teacher[:, 4:] = -torch.inf
    kept = topk.keep(teacher.clone(), 10)
    student = student.masked_fill(torch.arange(VOCABULARY) >= 30, -torch.inf).requires_grad_()
    loss = kl(kept.log_probabilities(), topk.buckets(student, kept.ids)).sum()
    loss.backward()
    assert student.grad is not None
    assert bool(loss.isfinite())
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[:, 30:].abs().max()) < 1e-30
