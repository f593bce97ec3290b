import itertools

import pytest
import torch
from solving import on_grid
from torch import Tensor

from llmpare.compress.grid import IntGrid, Statistics
from llmpare.compress.quantize import rtn

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 24, 48])
@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_on_the_grid_stay_as_they_are(
    bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits * size)
    grid = IntGrid(bits, symmetric, dtype)
    weight = on_grid(grid, 10, 48, size)
    for statistics in (None, Statistics(torch.diag(torch.rand(48) + 0.1))):
        assert torch.equal(rtn.solve(weight, statistics, grid, size).weight(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_gets_the_nearest_value_of_its_group(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    grid = IntGrid(bits, symmetric)
    weight = torch.randn(4, 32)
    solved = rtn.solve(weight, Statistics(torch.diag(torch.rand(32))), grid, 16)
    assert solved.codes.dtype == torch.uint8
    found = solved.weight()
    for row, column in itertools.product(range(4), range(32)):
        scale, zero = float(solved.scale[row, column // 16]), float(solved.zero[row, column // 16])
        nearest = min(abs((code - zero) * scale - weight[row, column].item()) for code in range(grid.top + 1))
        assert abs(found[row, column] - weight[row, column]).item() == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_the_energy_of_the_inputs_counts(symmetric: bool) -> None:
    """Rounding to nearest cannot use what the inputs have to do with each other."""
    torch.manual_seed(0)
    grid = IntGrid(3, symmetric)
    weight, x = torch.randn(8, 32), torch.randn(100, 32) * torch.logspace(-1, 1, 32)
    gram = x.t() @ x / 100
    full = rtn.solve(weight, Statistics(gram), grid, 16)
    diagonal = rtn.solve(weight, Statistics(gram.diagonal().diag()), grid, 16)
    plain = rtn.solve(weight, None, grid, 16)
    assert torch.equal(full.codes, diagonal.codes)
    assert not torch.equal(full.scale, plain.scale)

    def lost(q: Tensor) -> Tensor:
        return ((q - weight).square() * gram.diagonal()).sum()

    assert lost(full.weight()) < lost(plain.weight())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dead_column_has_no_say_in_the_scales(symmetric: bool) -> None:
    torch.manual_seed(1)
    grid = IntGrid(4, symmetric)
    weight, energy = torch.randn(6, 32), torch.rand(32) + 0.1
    energy[9] = 0
    wild = weight.clone()
    wild[:, 9] = 1000.0
    expected = rtn.solve(weight, Statistics(energy.diag()), grid, 32)
    found = rtn.solve(wild, Statistics(energy.diag()), grid, 32)
    assert torch.equal(found.scale, expected.scale)
    alive = torch.arange(32) != 9
    assert torch.equal(found.codes[:, alive], expected.codes[:, alive])
    assert (found.weight()[:, 9] > 0).all()  # it is rounded all the same: other text may bring it to life


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_column_alive_is_no_failure(symmetric: bool) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    solved = rtn.solve(weight, Statistics(torch.zeros(16, 16)), IntGrid(4, symmetric), 8)
    assert solved.weight().isfinite().all()


@pytest.mark.parametrize("shape", [(1, 32), (5, 1), (1, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_row_or_one_column(shape: tuple[int, int], symmetric: bool) -> None:
    torch.manual_seed(3)
    weight = torch.randn(shape)
    solved = rtn.solve(weight, Statistics(torch.eye(shape[1])), IntGrid(8, symmetric), shape[1])
    assert (solved.weight() - weight).abs().max() < 0.02


def test_inputs_are_left_alone_and_the_same_input_gives_the_same_bits() -> None:
    torch.manual_seed(4)
    weight, gram = torch.randn(8, 32), torch.rand(32).diag()
    gram[3, 3] = 0
    before = weight.clone(), gram.clone()
    for symmetric in (True, False):
        first = rtn.solve(weight, Statistics(gram), IntGrid(4, symmetric), 8)
        again = rtn.solve(weight.t().contiguous().t(), Statistics(gram), IntGrid(4, symmetric), 8)
        assert torch.equal(first.codes, again.codes)
        assert torch.equal(first.scale, again.scale)
        assert first.notes == []
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
