"""Every method against the same thing written out in float64, and where there is little or nothing to work with."""

import pytest
import torch
from torch import Tensor

from llmpare.compress.grid import Statistics
from llmpare.compress.prune import alps, magnitude, sparsegpt, wanda
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.pruned import Pruned
from llmpare.compress.prune.refit import refit

OPTIONS = {"sparsegpt": {"damping": 0.01}, "alps": {"damping": 0.01, "iterations": 20}}
SOLVERS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "alps": alps}


def problem(rows: int = 24, columns: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs = torch.randn(8 * columns, columns, generator=generator) @ mixed
    return weight, inputs.t() @ inputs / len(inputs)


def solve(method: str, weight: Tensor, gram: Tensor, quota: Quota) -> Pruned:
    return SOLVERS[method].solve(weight, Statistics(gram), quota, **OPTIONS.get(method, {}))  # type: ignore[attr-defined]


def loss(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    miss = (pruned - weight).double()
    return float(((miss @ gram.double()) * miss).sum())


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


# --- against textbook versions


def test_magnitude() -> None:
    weight, gram = problem()
    found = solve("magnitude", weight, gram, Quota((24,), (0.6,)))
    size = weight.double().abs()
    assert torch.equal(found.keep, size > size.flatten().sort().values[round(0.6 * weight.numel()) - 1])
    assert torch.equal(found.weight, torch.where(found.keep, weight, 0.0))


def test_wanda() -> None:
    weight, gram = problem()
    weight[3] = 0  # a row that says nothing
    found = solve("wanda", weight, gram, Quota((24,), (0.6,)))
    score = weight.double().abs() * gram.double().diagonal().sqrt()
    below = torch.where(score[:, None] <= score[:, :, None], score[:, None], 0.0)
    share = below.sum(2) / score.sum(1, keepdim=True).clamp(min=1e-9)
    assert torch.equal(found.keep, share > share.flatten().sort().values[round(0.6 * weight.numel()) - 1])
    assert torch.equal(found.weight, torch.where(found.keep, weight, 0.0))


def test_wanda_with_a_pattern_is_that_of_its_paper() -> None:
    weight, gram = problem()
    quota = Quota((24,), (0.5,), (2, 4))
    score = weight.abs() * gram.diagonal().sqrt()
    assert torch.equal(solve("wanda", weight, gram, quota).keep, quota.keep(score))


def optimal_brain_surgeon(weight: Tensor, gram: Tensor, block: int, keep_of: Quota) -> tuple[Tensor, Tensor]:
    """SparseGPT as its paper tells it: after every column the inverse of what is left of H, worked out afresh."""
    weight, gram = weight.double().clone(), damped(gram)
    columns = weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for at in range(columns):
        inverse = torch.linalg.inv(gram[at:, at:])
        if at % block == 0:
            rest = [torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(at, min(at + block, columns))]
            score = weight[:, at : at + block] ** 2 / torch.stack(rest)
            keep[:, at : at + block] = keep_of.keep(score)
        error = torch.where(keep[:, at], 0.0, weight[:, at]) / inverse[0, 0]
        weight[:, at:] -= error.unsqueeze(1) * inverse[0].unsqueeze(0)
        weight[:, at] = torch.where(keep[:, at], weight[:, at], 0.0)
    return weight, keep


@pytest.mark.parametrize("quota", [Quota((10, 14), (0.5, 0.7)), Quota((24,), (0.5,), (2, 4))], ids=["0.5", "2:4"])
def test_sparsegpt(quota: Quota) -> None:
    weight, gram = problem()
    found = solve("sparsegpt", weight, gram, quota)
    expected, keep = optimal_brain_surgeon(weight, gram, 32, quota)
    assert torch.equal(found.keep, keep)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_alps() -> None:
    """The iterations of ADMM in float64, with a linear system solved afresh each time."""
    weight, gram = problem()
    quota = Quota((24,), (0.5,))
    scale = damped(gram).diagonal().sqrt()
    scaled = damped(gram) / scale / scale.unsqueeze(1)
    target = sparse = weight.double() * scale
    multipliers = torch.zeros_like(sparse)
    for penalty in (0.03, 0.07, 0.17, 0.41, 1.0):
        for _ in range(4):
            system = scaled + penalty * torch.eye(40, dtype=torch.float64)
            free = torch.linalg.solve(system, (target @ scaled + penalty * sparse - multipliers).t()).t()
            wanted = free + multipliers / penalty
            keep = quota.keep(wanted.abs())
            sparse = torch.where(keep, wanted, 0.0)
            multipliers = multipliers + penalty * (free - sparse)
    found = solve("alps", weight, gram, quota)
    assert (found.keep != keep).sum() <= 2  # float32 may see a tie differently
    same = found.keep == keep
    torch.testing.assert_close(found.weight.double()[same], (sparse / scale)[same], rtol=1e-3, atol=1e-3)


def test_the_refit_is_the_least_squares_solution() -> None:
    weight, gram = problem()
    exact = damped(gram)
    keep = solve("wanda", weight, gram, Quota((24,), (0.5,))).keep
    found = refit(weight, exact.float(), keep, steps=60)
    for row, mask, solved in zip(weight.double(), keep, found, strict=True):
        expected = torch.linalg.solve(exact[mask][:, mask], (row @ exact)[mask])
        torch.testing.assert_close(solved[mask].double(), expected, rtol=1e-4, atol=1e-4)
    assert not found[~keep].any()


def test_few_steps_of_the_refit_are_enough() -> None:
    weight, gram = problem(64, 128)
    keep = solve("sparsegpt", weight, gram, Quota((64,), (0.5,))).keep
    exact = damped(gram).float()
    start = loss(weight, torch.where(keep, weight, 0.0), exact)
    best = loss(weight, refit(weight, exact, keep, steps=200), exact)
    assert loss(weight, refit(weight, exact, keep), exact) < best + 0.02 * (start - best)


# --- what must hold whatever the numbers


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8), (1, 5)])
def test_zeros_where_asked_and_nowhere_else(method: str, pattern: tuple[int, int] | None) -> None:
    weight, gram = problem()
    found = solve(method, weight, gram, Quota((24,), (0.5,), pattern))
    assert torch.equal(found.weight != 0, found.keep)
    assert not found.weight[~found.keep].signbit().any()  # no −0.0
    if pattern is None:
        assert int(found.keep.sum()) == weight.numel() // 2
    else:
        n, m = pattern
        assert (found.keep.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("method", SOLVERS)
def test_nothing_to_prune_changes_nothing(method: str) -> None:
    weight, gram = problem()
    found = solve(method, weight, gram, Quota((24,), (0.0,)))
    assert found.keep.all()
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", SOLVERS)
def test_everything_to_prune(method: str) -> None:
    weight, gram = problem()
    found = solve(method, weight, gram, Quota((24,), (1.0,)))
    assert not found.weight.any()
    assert not refit(weight, damped(gram).float(), found.keep).any()


def test_each_method_loses_less_than_the_one_before() -> None:
    losses = []
    for method in SOLVERS:
        total = 0.0
        for seed in range(4):
            weight, gram = problem(96, 96, seed)
            total += loss(weight, solve(method, weight, gram, Quota((96,), (0.5,))).weight, gram)
        losses.append(total)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[-2]


def test_the_refit_never_loses_more() -> None:
    for method in SOLVERS:
        weight, gram = problem(32, 64)
        exact = damped(gram).float()
        found = solve(method, weight, gram, Quota((32,), (0.7,)))
        better = refit(weight, exact, found.keep, found.weight)
        assert loss(weight, better, exact) <= loss(weight, found.weight, exact) * (1 + 1e-6)


# --- inputs that are hardly any


@pytest.mark.parametrize("method", SOLVERS)
def test_dead_columns_leave_first(method: str) -> None:
    weight, gram = problem()
    dead = [3, 7, 8, 39]
    gram[dead], gram[:, dead] = 0.0, 0.0
    found = solve(method, weight, gram, Quota((24,), (0.5,)))
    assert found.weight.isfinite().all()
    assert found.weight[:, dead].any() == (method == "magnitude")  # which does not look at inputs


@pytest.mark.parametrize("method", SOLVERS)
def test_all_columns_dead(method: str) -> None:
    weight, _ = problem()
    found = solve(method, weight, torch.zeros(40, 40), Quota((24,), (0.5,)))
    assert found.weight.isfinite().all()
    assert found.notes == []


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (3, 33)])
def test_the_smallest_matrices(method: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight, gram = problem(rows, columns)
    found = solve(method, weight, gram, Quota((rows,), (0.5,)))
    assert found.weight.shape == shape
    assert found.weight.isfinite().all()


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_a_gram_matrix_of_lower_rank(method: str) -> None:
    """One token: H has rank 1, and damping makes it definite."""
    weight = problem(8, 16)[0]
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    found = solve(method, weight, x.t() @ x, Quota((8,), (0.5,)))
    assert found.weight.isfinite().all()
    assert found.notes == []


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_what_is_not_positive_definite(method: str) -> None:
    weight, gram = problem()
    broken = torch.full_like(gram, torch.nan)
    found = solve(method, weight, broken, Quota((24,), (0.5,)))
    assert torch.equal(found.keep, solve("magnitude", weight, gram, Quota((24,), (0.5,))).keep)
    assert found.notes == [
        {
            "cause": "Gram matrix not positive definite, damping tried up to 1",
            "action": "mask by weight alone, nothing refitted",
        }
    ]
    indefinite = gram - 3 * gram.diagonal().mean() * torch.ones(40, 40) * (1 - torch.eye(40))
    found = solve(method, weight, indefinite, Quota((24,), (0.5,)))
    assert torch.equal(found.keep, solve("wanda", weight, indefinite, Quota((24,), (0.5,))).keep)
    assert found.notes[0]["action"] == "mask by weight and input, nothing refitted"
