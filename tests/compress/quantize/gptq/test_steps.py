"""What comes before GPTQ's loop and after it: correction for drifted inputs, and refinement."""

import itertools

import pytest
import torch
from solving import gram, solve, weights

from llmpare.compress.grid import IntGrid, Statistics
from llmpare.compress.quantize import linalg, refine

# --- correction


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


def test_correction_without_drift_does_nothing() -> None:
    h, weight, grid = gram(32, 7), weights(4, 32, 7), IntGrid(4, True)
    plain = solve(weight, Statistics(h), grid, 16)
    for drift in (None, torch.zeros(32, 32)):
        assert torch.equal(solve(weight, Statistics(h, drift), grid, 16, correction=1.0).codes, plain.codes)


# --- refinement


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
