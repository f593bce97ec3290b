from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved
from llmpare.compress.quantize import rtn, tuned
from llmpare.compress.quantize.tuned import Start

HIDDEN, INNER, TOKENS = 16, 32, 12


def forward(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """A block in small: norm, up, SiLU, down, and the residual around them."""
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gains["norm"]
    return hidden + torch.nn.functional.silu(normed @ weights["up"].t()) @ weights["down"].t()


@dataclass
class Problem:
    """A block of two linears, rounded to nearest, and the windows it is tuned on."""

    starts: dict[str, Start]
    gains: dict[str, Tensor]
    hidden: Tensor
    target: Tensor

    def pick(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = list(indices)
        return self.hidden[chosen], self.target[chosen]

    def tune(
        self,
        *,
        steps: float = 30,
        step_size: float = 0.01,
        windows: int = 4,
        seed: int = 0,
        run: tuned.Forward = forward,
    ) -> tuple[dict[str, Solved], dict[str, Tensor]]:
        return tuned.tune(
            run,
            self.pick,
            len(self.hidden),
            self.starts,
            self.gains,
            steps=steps,
            step_size=step_size,
            windows=windows,
            seed=seed,
        )

    def loss(self, solved: Mapping[str, Solved], gains: Mapping[str, Tensor], windows: slice) -> float:
        dtype = self.hidden.dtype
        weights = {name: part.weight().to(dtype) for name, part in solved.items()}
        out = forward(weights, {name: gain.to(dtype) for name, gain in gains.items()}, self.hidden[windows])
        return float((out.double() - self.target[windows].double()).square().mean())

    def start_loss(self, windows: slice) -> float:
        return self.loss({name: start.solved for name, start in self.starts.items()}, self.gains, windows)


def problem(
    seed: int = 0,
    *,
    bits: int = 3,
    symmetric: bool = True,
    size: int = 16,
    count: int = 24,
    dtype: torch.dtype = torch.float32,
    gain_dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    torch.manual_seed(seed)
    grid = IntGrid(bits, symmetric, torch.bfloat16)
    weights = {"up": torch.randn(INNER, HIDDEN) / 4, "down": torch.randn(HIDDEN, INNER) / 4}
    gains = {"norm": (1 + 0.1 * torch.randn(HIDDEN)).to(gain_dtype)}
    hidden = (torch.randn(count, TOKENS, HIDDEN) * torch.logspace(-0.5, 0.5, HIDDEN)).to(dtype)
    same = {name: weight.to(dtype) for name, weight in weights.items()}
    target = forward(same, {name: gain.to(dtype) for name, gain in gains.items()}, hidden)
    starts = {
        name: Start(weight, rtn.solve(weight, None, grid, min(size, weight.shape[1])), grid)
        for name, weight in weights.items()
    }
    return Problem(starts, gains, hidden, target)


def held_back(count: int) -> slice:
    """The last eighth, at least one window."""
    return slice(count - max(1, count // 8), count)


def same(a: Mapping[str, Solved], b: Mapping[str, Solved]) -> bool:
    return all(
        torch.equal(a[name].codes, b[name].codes)
        and torch.equal(a[name].scale, b[name].scale)
        and torch.equal(a[name].zero, b[name].zero)
        for name in a
    )


@pytest.mark.parametrize("step_size", [0.0025, 0.05, 5.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_worse_than_the_start_on_windows_held_back(bits: int, symmetric: bool, step_size: float) -> None:
    """…not even with steps so large that nothing good can come of them. What comes back can be stored as it is."""
    for seed, gain_dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        p = problem(seed, bits=bits, symmetric=symmetric, gain_dtype=gain_dtype)
        solved, gains = p.tune(step_size=step_size, steps=12, seed=seed)
        back = held_back(24)
        assert p.loss(solved, gains, back) <= p.start_loss(back) * (1 + 1e-6)
        for name, part in solved.items():
            start = p.starts[name]
            assert part.codes.dtype == torch.uint8
            assert part.codes.shape == start.weight.shape
            assert int(part.codes.max()) <= start.grid.top
            assert torch.equal(part.zero, start.solved.zero)
            assert part.scale.shape == start.solved.scale.shape
            assert torch.equal(part.scale.bfloat16().float(), part.scale)


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_rounding_lost_is_partly_won_back(symmetric: bool, size: int) -> None:
    """On windows that took no part in the training or in the choice: the same block, other inputs."""
    p = problem(1, symmetric=symmetric, size=size, count=64)
    fresh = Problem(p.starts, p.gains, p.hidden[48:], p.target[48:])
    p.hidden, p.target = p.hidden[:48], p.target[:48]
    solved, gains = p.tune(steps=60, step_size=0.02)
    assert fresh.loss(solved, gains, slice(None)) < 0.85 * fresh.start_loss(slice(None))
    assert any(not torch.equal(solved[name].codes, p.starts[name].solved.codes) for name in solved)


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_the_size_of_activations_does_not_matter(size: float) -> None:
    """Nothing is lost in gradients however small the block's output is."""
    plain, scaled = problem(1), problem(1)
    scaled.target = scaled.target * size
    expected, _ = plain.tune()
    found, _ = scaled.tune(run=lambda weights, gains, hidden: forward(weights, gains, hidden) * size)
    assert all((found[name].codes == expected[name].codes).float().mean() > 0.97 for name in found)
    assert any(not torch.equal(found[name].codes, scaled.starts[name].solved.codes) for name in found)


def test_small_activations_are_tuned_in_float16_too() -> None:
    """Where the gradient of a mean square over all of them is nothing."""
    ratios = []
    for dtype in (torch.float32, torch.float16):
        p = problem(1, dtype=dtype, count=48)
        p.target = p.target * 1e-3

        def run(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            return forward(weights, gains, hidden) * 1e-3

        def lost(solved: Mapping[str, Solved], gains: Mapping[str, Tensor], p: Problem = p) -> float:
            weights = {name: part.weight().to(p.hidden.dtype) for name, part in solved.items()}
            out = run(weights, {name: gain.to(p.hidden.dtype) for name, gain in gains.items()}, p.hidden)
            return float((out.double() - p.target.double()).square().mean())

        before = lost({name: start.solved for name, start in p.starts.items()}, p.gains)
        ratios.append(lost(*p.tune(steps=60, run=run)) / before)
    assert ratios[1] < 0.6  # float32: 0.4


def test_gains_are_trained_too() -> None:
    """With linears that need nothing, gains that are off are all there is to mend."""
    p = problem(2, bits=8, gain_dtype=torch.float32)
    for name, start in p.starts.items():
        p.starts[name] = Start(start.solved.weight(), start.solved, start.grid)
    exact = {name: start.solved.weight() for name, start in p.starts.items()}
    p.target = forward(exact, {"norm": p.gains["norm"] * (1 + 0.02 * torch.randn(HIDDEN))}, p.hidden)
    solved, gains = p.tune(steps=60, step_size=0.0)
    back = held_back(24)
    assert p.loss(solved, gains, back) < 0.5 * p.start_loss(back)
    unchanged = {name: start.solved for name, start in p.starts.items()}
    assert p.loss(unchanged, gains, back) < 0.5 * p.start_loss(back)


def test_scales_are_trained_too() -> None:
    """Scales 3 % too large: no step of V is allowed, so only `a` can mend them."""
    p = problem(3, bits=8)
    for name, start in p.starts.items():
        scale = start.grid.round_scale(start.solved.scale * 1.03)
        solved = Solved(start.solved.codes, scale, start.solved.zero)
        p.starts[name] = Start(start.weight, solved, start.grid)
    solved, _ = p.tune(steps=60, step_size=0.0)
    for name, part in solved.items():
        assert torch.equal(part.codes, p.starts[name].solved.codes)
        assert (part.scale.abs() < p.starts[name].solved.scale.abs()).float().mean() > 0.6
    assert p.loss(solved, p.gains, held_back(24)) < 0.6 * p.start_loss(held_back(24))


def test_a_start_that_is_exact_is_returned() -> None:
    p = problem(4)
    p.target = forward({name: start.solved.weight() for name, start in p.starts.items()},
                       {"norm": p.gains["norm"].float()}, p.hidden)  # fmt: skip
    solved, gains = p.tune()
    assert same(solved, {name: start.solved for name, start in p.starts.items()})
    assert torch.equal(gains["norm"], p.gains["norm"])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_windows(count: int) -> None:
    """One window cannot both train and judge: the start is returned."""
    p = problem(5, count=count)
    solved, gains = p.tune(step_size=0.02, steps=40)
    unchanged = same(solved, {name: start.solved for name, start in p.starts.items()})
    assert unchanged == (count == 1)
    assert torch.equal(gains["norm"], p.gains["norm"]) == (count == 1)


def test_no_steps_is_the_start() -> None:
    p = problem(6)
    solved, gains = p.tune(steps=0)
    assert same(solved, {name: start.solved for name, start in p.starts.items()})
    assert torch.equal(gains["norm"], p.gains["norm"])


@pytest.mark.parametrize(("count", "windows"), [(24, 4), (9, 8), (40, 3)])
def test_windows_that_judge_are_never_trained_on(count: int, windows: int) -> None:
    p = problem(7, count=count)
    training: list[list[int]] = []
    judging: list[list[int]] = []

    def watched(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        numbers = [next(i for i in range(count) if torch.equal(p.hidden[i], window)) for window in hidden]
        (training if torch.is_grad_enabled() else judging).append(numbers)
        return forward(weights, gains, hidden)

    tuned.tune(watched, p.pick, count, p.starts, p.gains, steps=20, step_size=0.01, windows=windows, seed=0)
    back = held_back(count)
    assert len(training) == 20
    assert all(len(set(numbers)) == min(windows, back.start) for numbers in training)
    assert {i for numbers in training for i in numbers} <= set(range(back.start))
    looks = Counter(i for numbers in judging for i in numbers)
    assert looks.keys() == set(range(back.start, count))
    assert len(set(looks.values())) == 1  # all of them, every time
    assert looks[back.start] > 2
    assert all(len(numbers) <= windows for numbers in judging)


def test_steps_fall_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    real = torch.optim.Adam.step

    def step(self: torch.optim.Adam) -> None:
        seen.append([group["lr"] for group in self.param_groups])
        real(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    problem(7).tune(steps=5, step_size=0.01)
    falls = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    torch.testing.assert_close(torch.tensor(seen), torch.stack((0.01 * falls, 2e-3 * falls), dim=1))


@pytest.mark.parametrize("seed", [1, 3])
def test_the_best_of_all_looks_is_kept(seed: int) -> None:
    """Every window that judges counts the same: of five, four are looked at together and the last by itself."""
    p = problem(seed, count=40)
    p.target[39] += 0.02 * torch.randn_like(p.target[39])
    losses: list[float] = []

    def watched(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        out = forward(weights, gains, hidden)
        if not torch.is_grad_enabled():
            target = p.target[35:39] if len(hidden) == 4 else p.target[39:]
            losses.extend((out - target).square().mean((1, 2)).tolist())
        return out

    solved, gains = p.tune(run=watched, step_size=0.02)
    looks = torch.tensor(losses).view(-1, 5).mean(1)
    assert len(looks) == 11  # before the first step, and ten times
    assert p.loss(solved, gains, held_back(40)) == pytest.approx(float(looks.min()), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_rounding_passed_straight_through(symmetric: bool) -> None:
    """Against autograd, in float64, of q = clip(round(u + V)), W̃ = (q − z)·s·a with rounding as the identity."""
    start = problem(8, bits=3, symmetric=symmetric, size=8).starts["down"]
    linear = tuned._Linear(start)
    torch.manual_seed(8)
    linear.shift += torch.randn_like(linear.shift) * 2  # some are clipped then
    linear.factor *= 1 + 0.05 * torch.randn_like(linear.factor)
    upstream = torch.randn(HIDDEN, INNER)
    linear.take(upstream)

    def straight(value: Tensor, rounded: Tensor) -> Tensor:
        return value + (rounded.double() - value).detach()

    rows, groups = start.solved.scale.shape
    codes = start.solved.codes.view(rows, groups, -1).double()
    scale, zero = start.solved.scale.double()[..., None], start.solved.zero.double()[..., None]
    place = codes + (start.weight.view(rows, groups, -1) / scale + zero - codes).clamp(-0.49, 0.49)
    shift = linear.shift.double().requires_grad_()
    factor = linear.factor.double().requires_grad_()
    moved = place + shift
    q = straight(moved, moved.round()).clamp(0, start.grid.top)
    stored = straight(scale * factor, start.grid.round_scale(start.solved.scale[..., None] * linear.factor))
    weight = ((q - zero) * stored).flatten(1)
    torch.testing.assert_close(linear.weight().double(), weight.detach(), rtol=1e-6, atol=1e-6)
    of_shift, of_factor = torch.autograd.grad((weight * upstream.double()).sum(), [shift, factor])
    # a scale is rounded to be stored; the gradient of V may use either, and uses the one before
    of_shift = of_shift / stored.detach() * scale
    assert linear.shift.grad is not None
    assert linear.factor.grad is not None
    torch.testing.assert_close(linear.shift.grad.double(), of_shift, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(linear.factor.grad.double(), of_factor, rtol=1e-5, atol=1e-7)
    assert 0.1 < (of_shift == 0).double().mean() < 0.9


def test_a_linear_begins_at_the_codes_of_the_solver() -> None:
    """…also where the solver did not round to nearest."""
    start = problem(9).starts["up"]
    torch.manual_seed(9)
    elsewhere = torch.randint(0, 8, start.solved.codes.shape, dtype=torch.uint8)
    moved = Solved(elsewhere, start.solved.scale, start.solved.zero)
    linear = tuned._Linear(Start(start.weight, moved, start.grid))
    assert torch.equal(linear.weight(), moved.weight())
    assert torch.equal(linear.solved().codes, elsewhere)
    assert torch.equal(linear.solved().scale, moved.scale)


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_and_stored_precisions(dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    """forward gets everything in the working dtype; gains come back as they are stored."""
    p = problem(10, dtype=dtype, gain_dtype=gain_dtype)
    seen = set()

    def watched(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        seen.update(each.dtype for each in (*weights.values(), *gains.values(), hidden))
        for name, weight in weights.items():
            assert weight.shape == p.starts[name].weight.shape
        return forward(weights, gains, hidden)

    solved, gains = tuned.tune(watched, p.pick, 24, p.starts, p.gains, steps=40, step_size=0.02, windows=4, seed=0)
    assert seen == {dtype}
    assert gains["norm"].dtype == gain_dtype
    assert gains["norm"].shape == p.gains["norm"].shape
    assert not gains["norm"].requires_grad
    back = held_back(24)
    assert p.loss(solved, gains, back) < p.start_loss(back)


def test_seeds_decide_the_result_and_nothing_else_does() -> None:
    p = problem(11)
    first, first_gains = p.tune(seed=3)
    torch.manual_seed(999)
    state = torch.get_rng_state()
    again, again_gains = p.tune(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again)
    assert torch.equal(first_gains["norm"], again_gains["norm"])
    assert not same(first, p.tune(seed=4)[0])


def test_works_where_gradients_are_off_and_leaves_its_inputs_alone() -> None:
    p = problem(12)
    tensors = [p.hidden, p.target, *p.gains.values()]
    for start in p.starts.values():
        tensors += [start.weight, start.solved.codes, start.solved.scale, start.solved.zero]
    before = [each.clone() for each in tensors]
    solved, _ = p.tune()
    with torch.no_grad():
        assert same(p.tune()[0], solved)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert not any(each.requires_grad for each in tensors)


@pytest.mark.filterwarnings("error")
def test_a_block_that_gives_no_numbers_keeps_its_start() -> None:
    p = problem(13)
    p.target[2] = torch.nan  # trained on, sooner or later
    solved, gains = p.tune(steps=30)
    back = held_back(24)
    assert p.loss(solved, gains, back) <= p.start_loss(back)
    p.target[:] = torch.nan
    solved, gains = p.tune(steps=5)
    assert same(solved, {name: start.solved for name, start in p.starts.items()})
    assert torch.equal(gains["norm"], p.gains["norm"])


def test_linears_of_different_grids_are_tuned_together_and_norms_may_be_missing() -> None:
    p = problem(14)
    other = problem(14, bits=8, symmetric=False, size=8)
    p.starts["down"] = other.starts["down"]

    def plain(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        assert gains == {}
        return forward(weights, p.gains, hidden)

    solved, gains = tuned.tune(plain, p.pick, 24, p.starts, {}, steps=30, step_size=0.01, windows=4, seed=0)
    assert gains == {}
    assert int(solved["down"].codes.max()) > 7 >= int(solved["up"].codes.max())
    assert p.loss(solved, p.gains, held_back(24)) < p.start_loss(held_back(24))
