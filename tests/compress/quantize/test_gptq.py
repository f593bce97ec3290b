import itertools

import pytest
import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.quantize import gptq, linalg, refine, rtn

BITS = (2, 3, 4, 8)
TIE = 1e-4  # of a code: closer to a rounding boundary than this, float32 and float64 may decide differently


def gram(columns: int, seed: int, *, tokens: int | None = None) -> Tensor:
    """H of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 3 * columns + 20
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
    h = x.t() @ x / tokens
    return (h + h.t()) / 2


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed)) * 0.05


def on_grid(grid: IntGrid, rows: int, columns: int, size: int) -> Tensor:
    """Weights that the grid holds exactly: in every group both ends of the range occur; scales have either sign."""
    codes = torch.randint(0, grid.top + 1, (rows, columns // size, size))
    codes[..., 0], codes[..., 1] = 0, grid.top
    codes = codes.gather(-1, torch.rand(codes.shape).argsort(-1))
    scale = (0.01 + torch.rand(rows, columns // size, 1)).to(grid.scale_dtype).float()
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle)
        scale *= torch.randint(0, 2, scale.shape) * 2 - 1
    else:
        zero = torch.randint(0, grid.top + 1, scale.shape).float()
    return ((codes - zero) * scale).view(rows, columns)


def solve(
    weight: Tensor,
    statistics: Statistics,
    grid: IntGrid,
    group_size: int,
    *,
    damping: float = 0.01,
    rounds: float = 2,
    sweeps: float = 2,
    correction: float = 0.0,
) -> Solved:
    return gptq.solve(
        weight, statistics, grid, group_size, damping=damping, rounds=rounds, sweeps=sweeps, correction=correction
    )


def lost(weight: Tensor, solved: Solved, h: Tensor) -> float:
    return float(refine.loss(weight.double(), solved.weight().double(), h.double()).sum())


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
    factor = linalg.inverse_factor(h[permutation][:, permutation])
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


def test_rows_do_not_see_each_other() -> None:
    """…so linears that read the same input can be solved as one stack."""
    h, weight, grid = gram(64, 2), weights(24, 64, 2), IntGrid(4, True)
    whole = solve(weight, Statistics(h), grid, 32)
    parts = [solve(part, Statistics(h), grid, 32) for part in weight.split(8)]
    together = torch.cat([part.weight() for part in parts])
    assert (~whole.weight().isclose(together, rtol=1e-4)).float().mean() < 0.01
    apart = sum(lost(part, each, h) for part, each in zip(weight.split(8), parts, strict=True))
    assert lost(weight, whole, h) == pytest.approx(apart, rel=0.02)


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


def test_correction_brings_the_output_nearer_to_the_original_one() -> None:
    """What counts is ‖W·X − Q·X̃‖², X being what the original model feeds the linear."""
    corrected = plain = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        original = torch.randn(500, 48) @ torch.randn(48, 48)
        inputs = original @ (torch.eye(48) + 0.05 * torch.randn(48, 48))
        weight, grid = weights(8, 48, seed), IntGrid(4, True)
        statistics = Statistics(inputs.t() @ inputs / 500, (original - inputs).t() @ inputs / 500)
        target = original @ weight.t()
        for strength in (0.0, 1.0):
            solved = solve(weight, statistics, grid, 16, correction=strength)
            miss = float((inputs @ solved.weight().t() - target).square().sum())
            corrected, plain = corrected + miss * strength, plain + miss * (1 - strength)
    assert corrected < 0.7 * plain


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_correction_solves_for_the_weight_that_makes_up_for_that_share(strength: float) -> None:
    h, weight, grid = gram(32, 5), weights(6, 32, 5), IntGrid(4, True)
    drift = 0.3 * gram(32, 6) @ torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(32)
    meant = weight + (strength * weight.double() @ drift.double() @ damped.inverse()).float()
    found = solve(weight, Statistics(h, drift), grid, 16, correction=strength)
    assert (found.codes == solve(meant, Statistics(h), grid, 16).codes).double().mean() > 0.98  # but for ties


@pytest.mark.parametrize(("rounds", "sweeps"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_refinement_goes_on_from_propagation_for_so_many_rounds_and_sweeps(rounds: int, sweeps: int) -> None:
    h, weight, grid = gram(64, 9), weights(16, 64, 9), IntGrid(2, True)
    plain = solve(weight, Statistics(h), grid, 16, rounds=0)
    start = (each.unsqueeze(0) for each in (plain.codes, plain.scale, plain.zero))
    steps = refine.Refinement(weight.unsqueeze(0), linalg.damp(h, 0.01).unsqueeze(0), *start, grid, 16)
    seen = []
    for _ in range(rounds):
        steps.refit()
        for _ in range(sweeps):
            steps.descend(h.diagonal().argsort(descending=True).unsqueeze(0), 1)
            seen.append(steps.codes)
    found = solve(weight, Statistics(h), grid, 16, rounds=rounds, sweeps=sweeps)
    assert torch.equal(found.codes, steps.codes[0])
    torch.testing.assert_close(found.scale, steps.scale[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))  # or more of them would show nothing


@pytest.mark.parametrize(("columns", "expected"), [(1 << 10, 8192), (14336, 576), (1 << 20, 8), (1 << 30, 1)])
def test_rows_that_are_solved_together(columns: int, expected: int) -> None:
    """About as many weights whatever the shape, whole cache lines of rows if there is room for one, and never none."""
    assert gptq.rows_at_once(torch.empty(1 << 15, columns, device="meta")) == expected


def test_correction_without_drift_does_nothing() -> None:
    h, weight, grid = gram(32, 7), weights(4, 32, 7), IntGrid(4, True)
    plain = solve(weight, Statistics(h), grid, 16)
    for drift in (None, torch.zeros(32, 32)):
        assert torch.equal(solve(weight, Statistics(h, drift), grid, 16, correction=1.0).codes, plain.codes)


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
