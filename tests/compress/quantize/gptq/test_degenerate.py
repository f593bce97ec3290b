"""Inputs that say little: dead columns, few tokens, copies, and Gram matrices that are none."""

import pytest
import torch
from solving import gram, lost, solve, weights
from torch import Tensor

from llmpare.compress.grid import IntGrid, Statistics
from llmpare.compress.quantize import linalg, refine, rtn


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_are_zero_and_the_others_do_not_notice_them(symmetric: bool) -> None:
    grid = IntGrid(4, symmetric)
    h, weight = gram(40, 5), weights(16, 40, 5)
    keep = torch.tensor([j for j in range(40) if j not in (3, 20, 39)])
    dead = torch.tensor([3, 20, 39])
    with_dead = h.clone()
    with_dead[dead], with_dead[:, dead] = 0, 0
    weight[:, dead] = 7.0  # would ruin every scale
    whole = solve(weight, Statistics(with_dead), grid, 40)
    reduced = solve(weight[:, keep], Statistics(h[keep][:, keep]), grid, 37)
    assert torch.equal(whole.weight()[:, dead], torch.zeros(16, 3))
    torch.testing.assert_close(whole.scale, reduced.scale, rtol=1e-4, atol=0)
    assert (whole.codes[:, keep] != reduced.codes).float().mean() < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_column_alive(symmetric: bool) -> None:
    solved = solve(weights(3, 16, 0), Statistics(torch.zeros(16, 16)), IntGrid(4, symmetric), 8)
    assert torch.equal(solved.weight(), torch.zeros(3, 16))


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (6, 1), (1, 1), (1, 130)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_row_or_one_column(rows: int, columns: int, symmetric: bool) -> None:
    h, weight = gram(columns, 1), weights(rows, columns, 1)
    solved = solve(weight, Statistics(h), IntGrid(8, symmetric), columns)
    assert solved.codes.shape == (rows, columns)
    assert solved.scale.shape == solved.zero.shape == (rows, 1)
    assert lost(weight, solved, h) < 1e-4 * float(refine.loss(weight, torch.zeros_like(weight), h).sum())


def nan_everywhere(h: Tensor) -> Tensor:
    return torch.full_like(h, torch.nan)


def nan_on_the_diagonal(h: Tensor) -> Tensor:
    return h.index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(torch.nan))


def nan_beside_it(h: Tensor) -> Tensor:
    return h.index_put((torch.tensor([2, 9]), torch.tensor([9, 2])), torch.tensor(torch.nan))


def infinite(h: Tensor) -> Tensor:
    return h.index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(torch.inf))


def indefinite(h: Tensor) -> Tensor:
    return h - 10 * h.diagonal().mean() * torch.ones_like(h)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("spoil", [nan_everywhere, nan_on_the_diagonal, nan_beside_it, infinite, indefinite])
def test_a_gram_matrix_that_is_none_falls_back_to_rounding_and_says_so(spoil, symmetric: bool) -> None:
    h, weight, grid = spoil(gram(32, 4)), weights(6, 32, 4), IntGrid(4, symmetric)
    solved = solve(weight, Statistics(h), grid, 16)
    assert solved.notes == [
        {"cause": "Gram matrix not positive definite, damping tried up to 1", "action": "weighted round-to-nearest"}
    ]
    assert torch.equal(solved.codes, rtn.solve(weight, Statistics(h), grid, 16).codes)
    plain = rtn.solve(weight, None, grid, 16)
    assert (solved.weight() - weight).square().sum() < 3 * (plain.weight() - weight).square().sum()


@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-7])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_fewer_tokens_than_columns(tokens: int, damping: float, correction: float) -> None:
    """A singular H: damping is raised as far as it takes, which is noted, and the result is good where it counts."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 64) * torch.logspace(0, 2, 64)
    h, weight, grid = x.t() @ x / tokens, weights(8, 64, 0), IntGrid(4, True)
    drift = 0.01 * torch.randn(64, 64)
    solved = solve(weight, Statistics(h, drift), grid, 32, damping=damping, correction=correction)
    assert solved.weight().isfinite().all()
    used = linalg.factorise(h, damping)[1]
    expected = f"Gram matrix not positive definite at damping {damping:g}"
    assert [note["cause"] for note in solved.notes] == ([expected] if used != damping else [])
    assert tokens > 1 or used > damping
    if not correction:
        assert lost(weight, solved, h) < lost(weight, rtn.solve(weight, Statistics(h), grid, 32), h)


def test_raised_damping_is_noted_with_what_was_used() -> None:
    x = torch.ones(1, 16)
    solved = solve(weights(2, 16, 0), Statistics(x.t() @ x), IntGrid(4, True), 16, damping=0.0)
    assert [note["action"] for note in solved.notes] == ["damping raised to 0.001"]


def test_columns_that_are_copies_of_each_other_share_their_errors() -> None:
    """A pair of equal inputs can split one error in two: better than rounding both alike."""
    torch.manual_seed(6)
    x = torch.randn(200, 32).repeat(1, 2)
    h, weight, grid = x.t() @ x / 200, weights(8, 64, 6), IntGrid(3, True)
    solved = solve(weight, Statistics(h), grid, 64)
    assert solved.notes == []
    assert lost(weight, solved, h) < 0.7 * lost(weight, rtn.solve(weight, Statistics(h), grid, 64), h)
