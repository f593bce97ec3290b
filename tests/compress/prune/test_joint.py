import pytest
import torch
from torch import Tensor

from llmpare.compress import quantize
from llmpare.compress.grid import IntGrid, Statistics
from llmpare.compress.prune.joint import MaskedGrid
from llmpare.compress.prune.masks import n_of_m
from llmpare.compress.prune.refit import refit
from llmpare.compress.quantize import gptq, linalg

ROWS, COLUMNS, GROUP = 16, 64, 32


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, the damped Gram matrix of its inputs, a mask, and the best weight for the mask."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    inputs = torch.randn(512, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    gram = linalg.damp(inputs.t() @ inputs / len(inputs), 0.01)
    keep = n_of_m(weight.abs(), 2, 4)
    return weight, gram, keep, refit(weight, gram, keep, steps=300)


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    miss = (other - weight).double()
    return float(((miss @ gram.double()) * miss).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_the_rest_is_on_the_grid(bits: int, symmetric: bool, problem: tuple[Tensor, ...]) -> None:
    _, gram, keep, best = problem
    grid = IntGrid(bits, symmetric, torch.bfloat16)
    solved = gptq.solve(best, Statistics(gram), MaskedGrid.of(grid, keep), GROUP, **quantize.METHODS["gptq"].defaults)
    found = solved.weight()
    assert not found[~keep].any()
    assert solved.codes.max() <= grid.top
    assert torch.equal(solved.codes[~keep].float(), solved.zero.repeat_interleave(GROUP, 1)[~keep])
    plain = grid.solved(best, *grid.search(best, gram.diagonal(), GROUP)).weight() * keep
    assert loss(best, found, gram) < 0.9 * loss(best, plain, gram)


def test_the_joint_loss_is_the_sum_of_both(problem: tuple[Tensor, ...]) -> None:
    """Why the refitted weights can be quantized in place of the original ones: see joint.py."""
    weight, gram, keep, best = problem
    other = best + torch.randn(best.shape, generator=torch.Generator().manual_seed(1)) * keep
    parts = loss(weight, best, gram) + loss(best, other, gram)
    assert loss(weight, other, gram) == pytest.approx(parts, rel=1e-4)


def test_without_a_mask_it_is_the_plain_grid(problem: tuple[Tensor, ...]) -> None:
    weight, gram, keep, _ = problem
    grid, options = IntGrid(3, True), quantize.METHODS["gptq"].defaults
    masked = gptq.solve(weight, Statistics(gram), MaskedGrid.of(grid, torch.ones_like(keep)), GROUP, **options)
    plain = gptq.solve(weight, Statistics(gram), grid, GROUP, **options)
    assert torch.equal(masked.codes, plain.codes)
    assert torch.equal(masked.scale, plain.scale)


def test_rows_that_are_solved_in_parts_keep_their_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = torch.randn(10, 64), torch.eye(64) + 0.1
    keep = torch.rand(10, 64) < 0.5
    options = quantize.METHODS["gptq"].defaults
    grid = MaskedGrid.of(IntGrid(4, True), keep)
    whole = gptq.solve(weight * keep, Statistics(gram), grid, GROUP, **options)
    monkeypatch.setattr(gptq, "rows_at_once", lambda weight: 3)
    parts = gptq.solve(weight * keep, Statistics(gram), grid, GROUP, **options)
    assert (parts.weight()[~keep] == 0).all()
    assert (parts.codes != whole.codes).float().mean() < 0.01
