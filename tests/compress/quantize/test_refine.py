import itertools

import pytest
import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid
from llmpare.compress.quantize import refine

BITS = (2, 3, 4, 8)
TIE = 1e-4  # of a code: closer to a rounding boundary than this, float32 and float64 may decide differently
COMBINATIONS = list(itertools.product(BITS, (8, 24, 48), (True, False)))


class Problem:
    """A weight, the H of correlated inputs, and codes and scales that leave something to be gained."""

    def __init__(self, seed: int, grid: IntGrid, rows: int = 8, columns: int = 48, size: int = 24) -> None:
        torch.manual_seed(seed)
        x = torch.randn(4 * columns, columns) @ torch.randn(columns, columns)
        self.gram = x.t() @ x / len(x)
        self.gram = (self.gram + self.gram.t()) / 2
        self.weight = torch.randn(rows, columns)
        self.grid, self.size = grid, size
        self.scale, self.zero = grid.search(self.weight, None, size)
        self.codes = grid.solved(self.weight, self.scale, self.zero).codes.float()
        self.order = torch.randperm(columns)

    def quantized(self, codes: Tensor, scale: Tensor) -> Tensor:
        """In float64."""
        rows, columns = codes.shape
        grouped = codes.double().view(rows, -1, self.size) - self.zero.double().unsqueeze(-1)
        return (grouped * scale.double().unsqueeze(-1)).view(rows, columns)

    def loss(self, codes: Tensor, scale: Tensor) -> Tensor:
        """L of every row, in float64."""
        miss = self.quantized(codes, scale) - self.weight.double()
        return torch.stack([row @ self.gram.double() @ row for row in miss])

    def refinement(self, codes: Tensor, scale: Tensor) -> refine.Refinement:
        one = (each.unsqueeze(0) for each in (self.weight, self.gram, codes, scale, self.zero))
        return refine.Refinement(*one, self.grid, self.size)

    def descend(self, codes: Tensor, scale: Tensor, sweeps: int = 1) -> Tensor:
        found = self.refinement(codes, scale)
        found.descend(self.order.unsqueeze(0), sweeps)
        return found.codes[0]

    def refit(self, codes: Tensor, scale: Tensor) -> Tensor:
        found = self.refinement(codes, scale)
        found.refit()
        return found.scale[0]


def test_loss_is_the_squared_error_of_the_output() -> None:
    torch.manual_seed(0)
    x, weight, quantized = torch.randn(50, 9), torch.randn(4, 9), torch.randn(4, 9)
    expected = (x.double() @ (quantized - weight).double().t()).square().sum(0)
    torch.testing.assert_close(refine.loss(weight, quantized, x.t() @ x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(refine.loss(weight, weight, x.t() @ x), torch.zeros(4))


def test_energy_is_that_of_the_output_whatever_strips_it_is_computed_in() -> None:
    """1300 columns are two and a half strips."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 1300), torch.randn(2, 3, 1300)
    expected = (weight.double() @ x.double().t()).square().sum(-1)
    torch.testing.assert_close(refine.energy(weight, x.t() @ x).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("bits", "size", "symmetric"), COMBINATIONS)
def test_a_sweep_takes_the_best_code_of_every_column_in_turn(bits: int, size: int, symmetric: bool) -> None:
    """Against a loop in float64 that computes the gradient anew for every column."""
    p = Problem(bits, IntGrid(bits, symmetric), size=size)
    codes = p.codes
    for _ in range(2):
        after = p.descend(codes, p.scale)
        now = codes.clone()
        for j in p.order.tolist():
            quantized = p.quantized(now, p.scale)
            gradient = (p.weight.double() - quantized) @ p.gram.double()[:, j]
            wanted = quantized[:, j] + gradient / p.gram[j, j].double()
            place = (wanted / p.scale[:, j // size].double() + p.zero[:, j // size].double()).clamp(0, p.grid.top)
            assert ((after[:, j] - place).abs() <= 0.5 + TIE).all()
            assert (after[:, j] != place.round()).sum() <= 1
            now[:, j] = after[:, j]
        assert not torch.equal(after, codes)
        codes = after


def test_a_sweep_is_the_same_over_several_blocks_of_columns() -> None:
    """300 columns are four and two thirds of the blocks in which the gradient is kept up to date at once."""
    p = Problem(0, IntGrid(3, True), rows=4, columns=300, size=100)
    after, now = p.descend(p.codes, p.scale), p.codes.clone()
    for j in p.order.tolist():
        quantized = p.quantized(now, p.scale)
        wanted = quantized[:, j] + (p.weight.double() - quantized) @ p.gram.double()[:, j] / p.gram[j, j].double()
        place = (wanted / p.scale[:, j // 100].double() + p.zero[:, j // 100].double()).clamp(0, p.grid.top)
        assert ((after[:, j] - place).abs() <= 0.5 + TIE).all()
        now[:, j] = after[:, j]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_when_the_sweeps_are_over_no_single_code_can_be_bettered(bits: int, symmetric: bool) -> None:
    p = Problem(1, IntGrid(bits, symmetric), rows=3, columns=24, size=12)
    codes = p.descend(p.codes, p.scale, sweeps=100)
    best = p.loss(codes, p.scale)
    for j, code in itertools.product(range(24), range(p.grid.top + 1)):
        other = codes.clone()
        other[:, j] = code
        assert (p.loss(other, p.scale) >= best * (1 - 1e-5)).all()
    assert torch.equal(p.descend(codes, p.scale), codes)


def test_two_sweeps_are_one_after_the_other() -> None:
    p = Problem(2, IntGrid(4, False))
    one = p.descend(p.descend(p.codes, p.scale), p.scale)
    assert (p.descend(p.codes, p.scale, sweeps=2) != one).float().mean() < 0.01
    assert torch.equal(p.descend(p.codes, p.scale, sweeps=0), p.codes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("bits", "size", "symmetric"), COMBINATIONS)
def test_no_step_of_refinement_ever_raises_the_loss(bits: int, size: int, symmetric: bool, seed: int) -> None:
    p = Problem(seed, IntGrid(bits, symmetric, torch.bfloat16), size=size)
    codes, scale, now = p.codes, p.scale, p.loss(p.codes, p.scale)
    first = now
    for _ in range(3):
        scale = p.refit(codes, scale)
        fitted = p.loss(codes, scale)
        assert (fitted <= now * (1 + 1e-4)).all()
        codes = p.descend(codes, scale)
        now = p.loss(codes, scale)
        assert (now <= fitted * (1 + 1e-4)).all()
        assert ((codes >= 0) & (codes <= p.grid.top) & (codes == codes.round())).all()
        assert torch.equal(scale.bfloat16().float(), scale)
    assert now.sum() < 0.9 * first.sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bits", "size", "symmetric"), COMBINATIONS)
def test_refitted_scales_are_the_least_squares_solution(bits: int, size: int, symmetric: bool, seed: int) -> None:
    """min over s of ‖Lᵀ(w − Σ_g s_g·c_g)‖² with H = L·Lᵀ, row by row. Scales begin 10 % off."""
    p = Problem(seed, IntGrid(bits, symmetric), size=size)
    start = p.scale * 1.1
    found = p.refit(p.codes, start)
    lower = torch.linalg.cholesky(p.gram.double())
    for row in range(len(p.weight)):
        centred = p.quantized(p.codes, torch.ones_like(p.scale))[row]
        pieces = torch.zeros(48, 48 // size, dtype=torch.float64)
        for g in range(48 // size):
            pieces[g * size : (g + 1) * size, g] = centred[g * size : (g + 1) * size]
        fit = torch.linalg.lstsq(lower.t() @ pieces, (lower.t() @ p.weight[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row].double(), fit, rtol=2e-3, atol=2e-3 * float(fit.abs().max()))
    assert (p.loss(p.codes, found) < p.loss(p.codes, start)).all()


def test_scales_are_refitted_a_few_rows_at_a_time_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem(8, IntGrid(3, True), rows=7, size=8)
    whole = p.refit(p.codes, p.scale * 1.1)
    monkeypatch.setattr(refine, "_CURVATURES", 0)
    torch.testing.assert_close(p.refit(p.codes, p.scale * 1.1), whole)


@pytest.mark.parametrize("groups", [150, 300])
def test_hundreds_of_groups(groups: int) -> None:
    """On several threads, where not every LAPACK solves batches of that size."""
    p = Problem(6, IntGrid(4, True), rows=3, columns=8 * groups, size=8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = p.refit(p.codes, p.scale * 1.1)
    finally:
        torch.set_num_threads(threads)
    assert (p.loss(p.codes, found) < p.loss(p.codes, p.scale)).all()


def test_the_steps_go_on_from_where_the_one_before_left_off() -> None:
    """In one refinement, or each in one of its own from the codes and scales of the last."""
    p = Problem(9, IntGrid(3, False, torch.bfloat16), rows=32)
    together = p.refinement(p.codes, p.scale)
    codes, scale = p.codes, p.scale
    for _ in range(3):
        together.refit()
        together.descend(p.order.unsqueeze(0), 2)
        scale = p.refit(codes, scale)
        codes = p.descend(codes, scale, 2)
    assert (together.codes[0] != codes).float().mean() < 0.01
    torch.testing.assert_close(p.loss(together.codes[0], together.scale[0]), p.loss(codes, scale), rtol=1e-2, atol=0)


def test_a_scale_may_change_its_sign() -> None:
    p = Problem(3, IntGrid(4, True))
    torch.testing.assert_close(p.refit(p.codes, -p.scale), p.refit(p.codes, p.scale), rtol=1e-4, atol=1e-6)
    assert (p.refit(p.codes, -p.scale).sign() == p.scale.sign()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_kept_where_rounding_the_better_ones_would_not_pay(dtype: torch.dtype) -> None:
    """At the optimum already, up to the stored precision: a second fit must not walk away from it."""
    kept = 0
    for seed in range(5):
        p = Problem(seed, IntGrid(4, True, dtype), rows=32)
        once = p.refit(p.codes, p.scale)
        nudged = once * 1.002  # not even a step of bfloat16
        found = p.refit(p.codes, nudged)
        unchanged = (found == nudged).all(1)
        assert (p.loss(p.codes, found) <= p.loss(p.codes, nudged) * (1 + 1e-4)).all()
        assert torch.equal(found[~unchanged].to(dtype).float(), found[~unchanged])
        kept += int(unchanged.sum())
    assert (kept > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_keeps_its_scale(symmetric: bool) -> None:
    p = Problem(4, IntGrid(4, symmetric), size=12)
    codes = p.codes.clone()
    codes[:, 12:24] = p.zero[:, 1:2]
    codes[5] = p.zero[5].repeat_interleave(12)
    found = p.refit(codes, p.scale)
    assert torch.equal(found[:, 1], p.scale[:, 1])
    assert torch.equal(found[5], p.scale[5])
    assert found.isfinite().all()
    assert (p.loss(codes, found) <= p.loss(codes, p.scale) * (1 + 1e-4)).all()


def test_two_groups_that_do_the_same_are_no_failure() -> None:
    """Equal inputs and equal codes: only the sum of their scales is determined."""
    torch.manual_seed(5)
    grid, x = IntGrid(4, True), torch.randn(100, 8).repeat(1, 2)
    weight = torch.randn(6, 8).repeat(1, 2)
    scale, zero = grid.search(weight, None, 8)
    codes = grid.solved(weight, scale, zero).codes.float()
    gram = x.t() @ x / 100
    one = (each.unsqueeze(0) for each in (weight, gram, codes, scale * 1.2, zero))
    refinement = refine.Refinement(*one, grid, 8)
    refinement.refit()
    found = refinement.scale[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), scale.sum(1), rtol=0.05, atol=0)


def test_weights_on_the_grid_are_a_fixed_point() -> None:
    for symmetric in (True, False):
        p = Problem(6, IntGrid(4, symmetric, torch.bfloat16))
        p.weight = p.quantized(p.codes, p.scale).float()
        assert torch.equal(p.refit(p.codes, p.scale), p.scale)
        assert torch.equal(p.descend(p.codes, p.scale, sweeps=3), p.codes)


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (5, 1), (1, 1)])
def test_one_row_or_one_column(rows: int, columns: int) -> None:
    p = Problem(7, IntGrid(4, False), rows=rows, columns=columns, size=columns)
    scale = p.refit(p.codes, p.scale * 1.3)
    codes = p.descend(p.codes, scale)
    assert codes.shape == (rows, columns)
    assert (p.loss(codes, scale) <= p.loss(p.codes, p.scale * 1.3) * (1 + 1e-4)).all()


def test_inputs_are_left_alone_and_may_have_any_layout() -> None:
    p = Problem(8, IntGrid(4, False))
    tensors = (p.weight, p.gram, p.order, p.codes, p.scale, p.zero)
    before = [each.clone() for each in tensors]
    scale, codes = p.refit(p.codes, p.scale), p.descend(p.codes, p.scale)
    assert torch.equal(p.refit(p.codes, p.scale), scale)
    assert torch.equal(p.descend(p.codes, p.scale), codes)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    p.weight, p.gram, p.codes = p.weight.t().contiguous().t(), p.gram.t(), p.codes.t().contiguous().t()
    p.scale, p.zero = p.scale.t().contiguous().t(), p.zero.t().contiguous().t()
    torch.testing.assert_close(p.refit(p.codes, p.scale), scale, rtol=1e-3, atol=1e-5)
    assert (p.descend(p.codes, p.scale) != codes).float().mean() < 0.01
