import itertools
import math
import statistics
from itertools import islice

import pytest
import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved

BITS = (2, 3, 4, 8)


def stored(scale: float, dtype: torch.dtype) -> float:
    """A scale as it is after being written and read back."""
    tiny = torch.finfo(dtype).tiny
    return torch.tensor(tiny if abs(scale) < tiny else scale, dtype=dtype).item()


def error(group: list[float], importance: list[float], scale: float, zero: float, top: int) -> float:
    total = 0.0
    for value, weight in zip(group, importance, strict=True):
        code = min(max(round(value / scale) + zero, 0), top)
        total += weight * (value - (code - zero) * scale) ** 2
    return total


def candidates(group: list[float], grid: IntGrid) -> list[tuple[float, float]]:
    """(scale, zero) of the range that just covers the group, then of many narrower ones."""
    low, high = min(group), max(group)
    if grid.symmetric:
        small, large = sorted((abs(low), abs(high)))
        full = max(large / grid.middle, small / max(grid.middle - 1, 1)) * (-1 if high > -low else 1)
        shrinks = [1 - i / 100 for i in range(61)]
        return [(stored(sign * shrink * full, grid.scale_dtype), grid.middle) for sign in (1, -1) for shrink in shrinks]
    low, high = min(low, 0.0), max(high, 0.0)
    found = []
    for below, above in itertools.product([1 - i / 20 for i in range(11)], repeat=2):
        scale = stored((high * above - low * below) / grid.top, grid.scale_dtype)
        found.append((scale, min(max(round(-low * below / scale), 0), grid.top)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_search_comes_close_to_trying_everything(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """…one by one, in float64 and in finer steps; and no group is worse off than with the range that covers it."""
    torch.manual_seed(bits)
    grid = IntGrid(bits, symmetric, dtype)
    weight, importance = torch.randn(20, 24), torch.rand(24) ** 2
    scale, zero = grid.search(weight, importance, 8)
    assert scale.shape == zero.shape == (20, 3)
    ratios = []
    for row, group in itertools.product(range(20), range(3)):
        part = slice(group * 8, group * 8 + 8)
        values, weights = weight[row, part].tolist(), importance[part].tolist()
        tried = [error(values, weights, s, z, grid.top) for s, z in candidates(values, grid)]
        now = error(values, weights, float(scale[row, group]), float(zero[row, group]), grid.top)
        assert now <= tried[0] * (1 + 1e-4)
        ratios.append(now / min(tried))
    assert statistics.geometric_mean(ratios) < (1.03 if symmetric else 1.1)


def squared(grid: IntGrid, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Σ (w − q)² of every group."""
    return (grid.solved(weight, scale, zero).weight() - weight).square().view(*scale.shape, -1).sum(-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", BITS)
def test_search_beats_plain_absmax(bits: int, seed: int) -> None:
    """Absmax as others do it: one positive scale that covers the largest weight of either side."""
    torch.manual_seed(seed)
    grid = IntGrid(bits, True)
    weight = torch.randn(16, 64)
    absmax = weight.view(16, 2, 32).abs().amax(-1) / max(grid.middle - 1, 1)
    plain = squared(grid, weight, absmax, torch.full_like(absmax, grid.middle))
    searched = squared(grid, weight, *grid.search(weight, None, 32))
    assert searched.sum() < plain.sum()


@pytest.mark.parametrize("bits", BITS)
def test_search_is_never_worse_than_plain_minmax(bits: int) -> None:
    torch.manual_seed(bits)
    grid = IntGrid(bits, False)
    weight = torch.randn(16, 64)
    low, high = weight.view(16, 2, 32).aminmax(dim=-1)
    scale = (high - low) / grid.top
    plain = squared(grid, weight, scale, (-low / scale).round().clamp(0, grid.top))
    searched = squared(grid, weight, *grid.search(weight, None, 32))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert bits == 8 or searched.sum() < plain.sum()  # with 8 bits there is hardly anything to gain


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_decides_where_the_error_goes(symmetric: bool) -> None:
    torch.manual_seed(0)
    grid = IntGrid(3, symmetric)
    weight = torch.randn(32, 16)
    importance = torch.ones(16)
    importance[5] = 1e4
    plain = grid.solved(weight, *grid.search(weight, None, 16)).weight()
    aware = grid.solved(weight, *grid.search(weight, importance, 16)).weight()
    assert (aware - weight)[:, 5].square().sum() < 0.25 * (plain - weight)[:, 5].square().sum()
    assert (((aware - weight).square() * importance).sum(1) <= ((plain - weight).square() * importance).sum(1)).all()


def test_no_importance_is_importance_one() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        grid = IntGrid(4, symmetric)
        for with_ones, without in zip(
            grid.search(weight, torch.ones(32), 16), grid.search(weight, None, 16), strict=True
        ):
            torch.testing.assert_close(with_ones, without, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_do_not_see_each_other(symmetric: bool) -> None:
    """300 rows of 1024 are searched in three slices, the last one shorter."""
    torch.manual_seed(1)
    grid = IntGrid(4, symmetric, torch.bfloat16)
    weight, importance = torch.randn(300, 1024), torch.rand(1024)
    scale, zero = grid.search(weight, importance, 512)
    for row in (0, 127, 128, 255, 256, 299):
        alone = grid.search(weight[row : row + 1], importance, 512)
        assert torch.equal(alone[0], scale[row : row + 1])
        assert torch.equal(alone[1], zero[row : row + 1])


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("bits", BITS)
def test_the_extra_level_goes_where_the_largest_weight_is(bits: int, side: float) -> None:
    """…which takes a negative scale when that weight is positive."""
    grid = IntGrid(bits, True)
    weight = torch.linspace(-(grid.middle - 1), grid.middle, grid.top + 1)[None] * side
    scale, zero = grid.search(weight, None, grid.top + 1)
    assert scale.item() == -side
    solved = grid.solved(weight, scale, zero)
    assert torch.equal(solved.weight(), weight)
    assert sorted(solved.codes[0].tolist()) == list(range(grid.top + 1))


@pytest.mark.parametrize("bits", BITS)
def test_zero_weights_stay_zero(bits: int) -> None:
    for symmetric, dtype in itertools.product((True, False), (torch.float32, torch.float16, torch.bfloat16)):
        grid = IntGrid(bits, symmetric, dtype)
        scale, zero = grid.search(torch.zeros(2, 8), torch.ones(8), 4)
        assert torch.equal(grid.solved(torch.zeros(2, 8), scale, zero).weight(), torch.zeros(2, 8))
        assert (scale.to(dtype) != 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_asymmetric_range_always_holds_zero(sign: float) -> None:
    """Weights of one sign only: the other end of the range is 0 itself."""
    grid = IntGrid(4, False)
    weight = (sign * torch.linspace(5.0, 6.0, 16))[None]
    scale, zero = grid.search(weight, None, 16)
    assert zero.item() == (0 if sign > 0 else grid.top)
    assert scale.item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_what_a_loader_reads(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 64) * torch.logspace(-6, 5, 8)[:, None]
    for symmetric in (True, False):
        scale, zero = IntGrid(2, symmetric, dtype).search(weight, torch.rand(64), 32)
        assert torch.equal(scale.to(dtype).float(), scale)
        assert (scale.abs() >= torch.finfo(dtype).tiny).all()
        assert torch.equal(zero, zero.round())
        assert ((zero >= 0) & (zero <= 3)).all()


def test_scales_are_never_zero_subnormal_or_infinite() -> None:
    wanted = torch.tensor([0.0, 1e-9, -1e-30, 1e-4, -1e-4, 1.0, 1e6, -1e6])
    tiny = torch.finfo(torch.float16).tiny
    found = IntGrid(4, True, torch.float16).round_scale(wanted)
    assert found.tolist()[:3] == [tiny] * 3
    assert found[3:6].tolist() == [stored(1e-4, torch.float16), stored(-1e-4, torch.float16), 1.0]
    assert found[6:].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_that_is_no_number_leaves_the_full_range(symmetric: bool) -> None:
    """The statistics of a fallback may hold NaN; the scales that come of it must still fit the weights."""
    torch.manual_seed(3)
    grid = IntGrid(4, symmetric)
    weight = torch.randn(4, 32)
    importance = torch.ones(32)
    importance[7] = torch.nan
    scale, zero = grid.search(weight, importance, 32)
    miss = grid.solved(weight, scale, zero).weight() - weight
    assert (miss.abs() <= 0.501 * scale.abs()).all()
    assert (scale.abs() <= 2 * weight.abs().amax(1, keepdim=True) / (grid.middle - 1)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_quantize_takes_the_nearest_code(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    grid = IntGrid(bits, symmetric)
    weight = torch.randn(200)
    scale, zero = torch.tensor(-0.3), torch.tensor(float(grid.middle))
    codes = grid.quantize(weight, scale, zero)
    for value, code in zip(weight.tolist(), codes.tolist(), strict=True):
        reachable = [(c - grid.middle) * scale.item() for c in range(grid.top + 1)]
        assert abs(value - reachable[int(code)]) == pytest.approx(min(abs(value - r) for r in reachable))
    assert torch.equal(grid.quantize(grid.dequantize(codes, scale, zero), scale, zero), codes)


def test_columns_are_those_of_their_groups_in_the_order_of_the_loop() -> None:
    scale, zero = torch.tensor([[1.0, 10.0], [2.0, -4.0]]), torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    some = IntGrid(2, False).columns(torch.tensor([[3, 0, 2, 1]]), scale[None], zero[None], 2)
    assert some(slice(0, 4)).scale.tolist() == [[[10.0, -4.0], [1.0, 2.0], [10.0, -4.0], [1.0, 2.0]]]
    two = some(slice(0, 2))
    assert two.low.tolist() == [[[0.0, -3.0], [-1.0, -2.0]]]
    assert two.high.tolist() == [[[3.0, 0.0], [2.0, 1.0]]]
    assert [[part.tolist() for part in each] for each in some(slice(2, 3)).bounds()] == [[[[0.0, -3.0]], [[3.0, 0.0]]]]


def test_every_matrix_has_columns_of_its_own() -> None:
    scale, zero = torch.tensor([[[1.0, 10.0]], [[2.0, -4.0]]]), torch.full((2, 1, 2), 2.0)
    two = IntGrid(2, True).columns(torch.tensor([[0, 1], [1, 0]]), scale, zero, 1)(slice(0, 2))
    assert two.scale.tolist() == [[[1.0], [10.0]], [[-4.0], [2.0]]]
    assert list(islice(two.bounds(), 2)) == [(-2, 1)] * 2


def test_solved_puts_scales_on_consecutive_columns() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[1.0, 10.0], [2.0, -4.0]]), torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    solved = Solved(codes, scale, zero)
    assert solved.weight().tolist() == [[-1.0, 0.0, 20.0, 30.0], [2.0, 0.0, 8.0, 12.0]]
    above, below = solved.split([1, 1])
    assert (above.weight().tolist(), below.weight().tolist()) == ([[-1.0, 0.0, 20.0, 30.0]], [[2.0, 0.0, 8.0, 12.0]])


def test_codes_at_or_above_128_are_not_read_as_negative() -> None:
    solved = IntGrid(8, False).solved(torch.tensor([[0.0, 128.0, 255.0]]), torch.ones(1, 1), torch.zeros(1, 1))
    assert solved.codes.tolist() == [[0, 128, 255]]
    assert solved.weight().tolist() == [[0.0, 128.0, 255.0]]


def views(weight: Tensor) -> list[Tensor]:
    """The same numbers in memory layouts a caller may well have."""
    wide = torch.zeros(weight.shape[0], weight.shape[1] + 3)
    wide[:, 3:] = weight
    return [weight.t().contiguous().t(), wide[:, 3:]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_layout_changes_nothing_and_inputs_are_left_alone(symmetric: bool) -> None:
    torch.manual_seed(4)
    grid = IntGrid(3, symmetric)
    weight, importance = torch.randn(6, 32), torch.rand(32)
    before = weight.clone(), importance.clone()
    expected = grid.search(weight, importance, 8)
    solved = grid.solved(weight, *expected)
    kept = [each.clone() for each in expected]
    for view in views(weight):
        found = grid.search(view, importance, 8)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(grid.solved(view, *found).codes, solved.codes)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_one_row_one_column() -> None:
    for symmetric in (True, False):
        grid = IntGrid(2, symmetric)
        scale, zero = grid.search(torch.tensor([[0.7]]), None, 1)
        assert grid.solved(torch.tensor([[0.7]]), scale, zero).weight().item() == pytest.approx(0.7)
    assert math.isfinite(scale.item())
