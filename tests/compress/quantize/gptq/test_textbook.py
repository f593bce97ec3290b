"""GPTQ's loop over the columns against its textbook version in float64, and against plain rounding."""

import pytest
import torch
from solving import gram, lost, on_grid, solve, weights
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.quantize import gptq, linalg, rtn

BITS = (2, 3, 4, 8)
TIE = 1e-4  # of a code: closer to a rounding boundary than this, float32 and float64 may decide differently


def textbook(weight: Tensor, h: Tensor, damping: float, solved: Solved, group_size: int) -> Tensor:
    """Where every weight stands on its grid, in codes, at the moment it is rounded: [rows, columns], float64.

    GPTQ as it is derived in the paper, with act-order: columns in the order of falling H_jj; after each one the
    others make up for its error by (w_j − q_j)/[H⁻¹]_jj · [H⁻¹]_j,:, and it is eliminated from the inverse. The
    codes that `solved` holds are what is propagated, so one close decision does not make all later ones differ.
    """
    h, pending = h.double().clone(), weight.double().clone()
    dead = h.diagonal() == 0
    h.diagonal().add_(damping * h.diagonal()[~dead].mean())
    h[dead, dead] = 1.0
    pending[:, dead] = 0.0
    inverse = torch.linalg.inv(h)
    scale, zero = solved.scale.double(), solved.zero.double()
    quantized = solved.weight().double()
    place = torch.empty_like(pending)
    energy = h.diagonal().masked_fill(dead, 0.0)
    for j in sorted(range(len(h)), key=lambda column: -float(energy[column])):
        group = j // group_size
        place[:, j] = pending[:, j] / scale[:, group] + zero[:, group]
        error = (pending[:, j] - quantized[:, j]) / inverse[j, j]
        pending -= torch.outer(error, inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return place


def assert_nearest(codes: Tensor, place: Tensor, top: int) -> None:
    """Codes are the places rounded, but for ties."""
    place = place.clamp(0, top)
    assert ((codes - place).abs() <= 0.5 + TIE).all()
    assert (codes != place.round()).double().mean() < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "size"),
    [
        (4, 6, 32, 8),
        (2, 5, 32, 32),
        (3, 4, 96, 32),
        (8, 4, 64, 64),
        (4, 16, 128, 64),
        (4, 16, 129, 43),
        (3, 9, 320, 64),
    ],
)
def test_codes_are_those_of_the_textbook(bits: int, rows: int, columns: int, size: int, symmetric: bool) -> None:
    """320 columns are two and a half of the blocks whose corrections are propagated at once."""
    h, weight = gram(columns, bits), weights(rows, columns, bits)
    grid = IntGrid(bits, symmetric)
    solved = solve(weight, Statistics(h), grid, size, rounds=0)
    scale, zero = grid.search(weight, h.diagonal(), size)
    assert torch.equal(solved.scale, scale)
    assert torch.equal(solved.zero, zero)
    assert_nearest(solved.codes, textbook(weight, h, 0.01, solved, size), grid.top)
    assert solved.notes == []


def test_codes_are_those_of_the_textbook_with_dead_columns() -> None:
    h, weight = gram(48, 1), weights(8, 48, 1)
    for dead in (0, 17, 47):
        h[dead], h[:, dead] = 0, 0
    solved = solve(weight, Statistics(h), IntGrid(4, False), 16, rounds=0)
    assert_nearest(solved.codes, textbook(weight, h, 0.01, solved, 16), 15)


@pytest.mark.parametrize("order", ["falling", "random"])
def test_propagate_follows_the_order_it_is_given(order: str) -> None:
    """…also one that is not act-order."""
    h, weight, grid = linalg.damp(gram(40, 3), 0.01), weights(5, 40, 3), IntGrid(3, True)
    permutation = torch.arange(39, -1, -1) if order == "falling" else torch.randperm(40)
    factor = linalg.upper_factor(h[permutation][:, permutation])
    assert factor is not None
    scale, zero = grid.search(weight, None, 20)
    one = (each.unsqueeze(0) for each in (weight, factor, permutation, scale, zero))
    codes = gptq.propagate(*one, grid, 20)[0]
    inverse, pending = torch.linalg.inv(h.double()), weight.double().clone()
    for j in permutation.tolist():
        s, z = scale[:, j // 20].double(), zero[:, j // 20].double()
        assert_nearest(codes[:, j], pending[:, j] / s + z, grid.top)
        error = (pending[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        pending -= torch.outer(error, inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_each_part_of_the_method_pays(bits: int, symmetric: bool) -> None:
    """Error propagation loses less than rounding, refinement less than propagation alone."""
    grid = IntGrid(bits, symmetric)
    rounded = propagated = refined = 0.0
    for seed in range(4):
        h, weight = gram(64, seed), weights(12, 64, seed)
        rounded += lost(weight, rtn.solve(weight, Statistics(h), grid, 32), h)
        propagated += lost(weight, solve(weight, Statistics(h), grid, 32, rounds=0), h)
        refined += lost(weight, solve(weight, Statistics(h), grid, 32), h)
    assert refined < 0.95 * propagated < 0.8 * rounded


def test_smaller_groups_lose_less() -> None:
    h, weight, grid = gram(96, 0), weights(16, 96, 0), IntGrid(3, True)
    losses = [lost(weight, solve(weight, Statistics(h), grid, size), h) for size in (96, 48, 24, 12)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 48])
@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_on_the_grid_stay_as_they_are(
    bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits * size)
    grid = IntGrid(bits, symmetric, dtype)
    weight = on_grid(grid, 10, 48, size)
    for rounds in (0, 2):
        assert torch.equal(solve(weight, Statistics(gram(48, bits)), grid, size, rounds=rounds).weight(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_have_nothing_to_do_with_each_other_give_plain_rounding(symmetric: bool) -> None:
    weight, grid = weights(8, 160, 0), IntGrid(4, symmetric)
    solved = solve(weight, Statistics(torch.eye(160)), grid, 32, rounds=0)
    expected = rtn.solve(weight, None, grid, 32)
    assert torch.equal(solved.codes, expected.codes)
    assert torch.equal(solved.scale, expected.scale)
