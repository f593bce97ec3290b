"""Choosing columns and refitting what remains, against slow float64 versions of the textbook."""

import itertools

import pytest
import torch
from torch import Tensor

from llmpare.compress.prune import width

ROWS, COLUMNS = 7, 12


def problem(columns: int = COLUMNS, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs [tokens, columns] that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, columns, dtype=torch.float64, generator=generator) @ mix
    return torch.randn(ROWS, columns, dtype=torch.float64, generator=generator), x


def least(weight: Tensor, x: Tensor, kept: list[int]) -> Tensor:
    """The error left when the kept columns do all they can: an ordinary least-squares fit to the outputs."""
    fit = torch.linalg.lstsq(x[:, kept], x @ weight.t()).solution
    return (x @ weight.t() - x[:, kept] @ fit).square().sum() / len(x)


def spread(groups: list[int], size: int) -> list[int]:
    """The columns of these groups."""
    return [group * size + i for group in groups for i in range(size)]


def test_refit_is_the_least_squares_fit() -> None:
    weight, x = problem()
    gram, kept = x.t() @ x / len(x), [0, 3, 4, 9]
    found = width.refit(weight @ gram, gram, torch.tensor(kept))
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.t()).solution.t()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_refit_of_everything_is_the_weight() -> None:
    weight, x = problem()
    gram = width.damped(x.t() @ x / len(x), 0.01)
    torch.testing.assert_close(width.refit(weight @ gram, gram, torch.arange(COLUMNS)), weight)


@pytest.mark.parametrize("size", [1, 3])
def test_every_column_or_group_leaves_at_the_least_cost(size: int) -> None:
    weight, x = problem()
    gram = x.t() @ x / len(x)
    groups = list(range(COLUMNS // size))
    while len(groups) > 1:
        without = [[g for g in groups if g != gone] for gone in groups]
        groups = min(without, key=lambda left: float(least(weight, x, spread(left, size))))
        found = width.eliminate_groups(weight, gram, size, len(groups))
        assert found.tolist() == groups
        if size == 1:
            assert width.eliminate(weight, gram, len(groups)).tolist() == groups


def test_blocks_of_columns_leave_as_one_by_one() -> None:
    weight, x = problem(columns=200, tokens=600)
    gram = width.damped(x.t() @ x / len(x), 0.001)
    for keep in (199, 130, 40):  # within a block, past one, past two
        assert torch.equal(width.eliminate(weight, gram, keep), width.eliminate_groups(weight, gram, 1, keep))


def test_leaving_one_at_a_time_beats_leaving_by_costs_taken_once() -> None:
    weight, x = problem()
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    twins = torch.cat([x, x + 0.01 * noise], 1)
    doubled = torch.cat([weight, weight], 1)
    gram = width.damped(twins.t() @ twins / len(x), 1e-6)
    costs = doubled.square().sum(0) / torch.linalg.inv(gram).diagonal()
    at_once = costs.argsort(descending=True)[:COLUMNS].tolist()
    step_by_step = width.eliminate(doubled, gram, COLUMNS).tolist()
    assert least(doubled, twins, step_by_step) < 0.01 * least(doubled, twins, at_once)


def test_elimination_is_close_to_the_best_choice_there_is() -> None:
    weight, x = problem()
    gram = x.t() @ x / len(x)
    best = min(float(least(weight, x, list(kept))) for kept in itertools.combinations(range(COLUMNS), 6))
    assert float(least(weight, x, width.eliminate(weight, gram, 6).tolist())) < 1.3 * best


def test_columns_that_say_nothing_new_leave_first_and_cost_nothing() -> None:
    weight, x = problem()
    x[:, 5] = x[:, 2]  # a duplicate
    x[:, 7] = 0  # dead
    gram = width.damped(x.t() @ x / len(x), 1e-7)
    kept = width.eliminate(weight, gram, COLUMNS - 2)
    assert 7 not in kept
    assert (2 in kept) != (5 in kept)
    refitted = width.refit(weight @ gram, gram, kept)
    error = (x @ weight.t() - x[:, kept] @ refitted.t()).square().sum() / (x @ weight.t()).square().sum()
    assert error < 1e-6


def test_single_precision_chooses_and_solves_as_double() -> None:
    weight, x = problem(columns=96, tokens=400)
    gram = width.damped(x.t() @ x / len(x), 0.001)
    kept = width.eliminate(weight.float(), gram.float(), 48)
    refitted = width.refit((weight @ gram).float(), gram.float(), kept).double()
    exact = width.refit(weight @ gram, gram, kept)
    assert (refitted - exact).norm() < 1e-3 * exact.norm()
    assert len(set(kept.tolist()) & set(width.eliminate(weight, gram, 48).tolist())) > 44


def test_what_is_no_gram_matrix_is_refused() -> None:
    weight, _ = problem()
    gram = torch.full((COLUMNS, COLUMNS), torch.nan, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        width.refit(weight, gram, torch.arange(4))


def test_no_flow_at_all_leaves_a_matrix_that_can_be_inverted() -> None:
    assert torch.equal(width.damped(torch.zeros(3, 3), 0.01), torch.eye(3))
