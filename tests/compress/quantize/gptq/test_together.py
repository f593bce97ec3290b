"""Rows and matrices that are solved together: as each by itself, every time, in any memory layout."""

import itertools

import pytest
import torch
from solving import gram, lost, solve, weights

from llmpare.compress.grid import IntGrid, Statistics
from llmpare.compress.quantize import gptq


def test_rows_do_not_see_each_other() -> None:
    """…so linears that read the same input can be solved as one stack."""
    h, weight, grid = gram(64, 2), weights(24, 64, 2), IntGrid(4, True)
    whole = solve(weight, Statistics(h), grid, 32)
    parts = [solve(part, Statistics(h), grid, 32) for part in weight.split(8)]
    together = torch.cat([part.weight() for part in parts])
    assert (~whole.weight().isclose(together, rtol=1e-4)).float().mean() < 0.01
    apart = sum(lost(part, each, h) for part, each in zip(weight.split(8), parts, strict=True))
    assert lost(weight, whole, h) == pytest.approx(apart, rel=0.02)


@pytest.mark.parametrize(("columns", "expected"), [(1 << 10, 8192), (14336, 576), (1 << 20, 8), (1 << 30, 1)])
def test_rows_that_are_solved_together(columns: int, expected: int) -> None:
    """About as many weights whatever the shape, whole cache lines of rows if there is room for one, and never none."""
    assert gptq.rows_at_once(torch.empty(1 << 15, columns, device="meta")) == expected


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "correction"), [(4, 0.0), (2, 0.5)])
def test_matrices_of_one_shape_are_solved_together_as_each_by_itself(
    bits: int, correction: float, symmetric: bool
) -> None:
    """Among them one with dead columns, one that needs more damping and one that cannot be factorised at all."""
    count, columns = 5, 96
    grams = [gram(columns, seed) for seed in range(count)]
    grams[1][[3, 50]], grams[1][:, [3, 50]] = 0, 0
    grams[2] = grams[2] - 0.05 * grams[2].diagonal().mean() * torch.eye(columns)
    grams[3][5, 5] = torch.nan
    drift = torch.randn(count, columns, columns, generator=torch.Generator().manual_seed(0)) * 0.01
    known = [Statistics(h, d) for h, d in zip(grams, drift, strict=True)]
    many = [weights(24, columns, seed) for seed in range(count)]
    options = {"damping": 0.01, "rounds": 1, "sweeps": 2, "correction": correction}
    grid = IntGrid(bits, symmetric, torch.bfloat16)
    kept = [h.clone() for h in grams]
    together = gptq.solve_alike(many, known, grid, 32, **options)
    assert all(torch.equal(h, before) or h.isnan().any() for h, before in zip(grams, kept, strict=True))
    assert [len(each.notes) for each in together] == [0, 0, 1, 1, 0]
    for index, each in enumerate(together):
        alone = gptq.solve(many[index], known[index], grid, 32, **options)
        assert each.notes == alone.notes
        assert (each.codes != alone.codes).float().mean() < 0.01  # a close decision may differ in the last bit
        if index != 3:
            found, expected = (lost(many[index], solved, grams[index]) for solved in (each, alone))
            assert found == pytest.approx(expected, rel=1e-2)


def test_no_matrix_at_all_is_solved_to_nothing() -> None:
    assert gptq.solve_alike([], [], IntGrid(4, True), 32, damping=0.01, rounds=1, sweeps=1, correction=0.0) == []


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_input_gives_the_same_bits_and_is_left_alone(symmetric: bool) -> None:
    h, weight, drift = gram(160, 8), weights(8, 160, 8), 0.1 * gram(160, 9)
    h[5], h[:, 5] = 0, 0
    before = [each.clone() for each in (h, weight, drift)]
    grid = IntGrid(4, symmetric, torch.bfloat16)
    first = solve(weight, Statistics(h, drift), grid, 32, correction=0.5)
    again = solve(weight, Statistics(h, drift), grid, 32, correction=0.5)
    for a, b in ((first.codes, again.codes), (first.scale, again.scale), (first.zero, again.zero)):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before, (h, weight, drift), strict=True))
    assert first.codes.dtype == torch.uint8
    assert int(first.codes.max()) <= grid.top
    assert torch.equal(first.scale.bfloat16().float(), first.scale)


def test_memory_layout_does_not_matter() -> None:
    h, weight, grid = gram(160, 9), weights(8, 160, 9), IntGrid(4, True)
    expected = solve(weight, Statistics(h), grid, 32)
    wide_weight, wide = torch.zeros(8, 200), torch.zeros(200, 200)
    wide_weight[:, 40:], wide[40:, 40:] = weight, h
    for w, g in itertools.product((weight.t().contiguous().t(), wide_weight[:, 40:]), (h.t(), wide[40:, 40:])):
        found = solve(w, Statistics(g), grid, 32)
        assert (found.codes != expected.codes).float().mean() < 0.01
        assert lost(weight, found, h) == pytest.approx(lost(weight, expected, h), rel=0.02)
