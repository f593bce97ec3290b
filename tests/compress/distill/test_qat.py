"""Rounding in training: what runs, what its gradients are in float64, and what is left when it has finished."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmpare.compress.distill import qat
from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.quantize import gptq, rtn

ROWS, COLUMNS, SIZE = 6, 16, 8


def problem(bits: int, *, symmetric: bool, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, qat.Start]:
    """A weight and what GPTQ makes of it on correlated inputs: some codes are far from the nearest ones."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    inputs = torch.randn(40, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    grid = IntGrid(bits, symmetric, scale_dtype)
    statistics = Statistics(inputs.t() @ inputs / len(inputs))
    solved = gptq.solve(weight, statistics, grid, SIZE, damping=0.01, rounds=1, sweeps=1, correction=0.0)
    return weight, qat.Start(solved, grid)


def rounded(weight: Tensor, start: qat.Start) -> qat.RoundedLinear:
    linear = nn.Linear(COLUMNS, ROWS)
    linear.weight = nn.Parameter(weight.clone())
    return qat.RoundedLinear(linear, start, transposed=False)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_begins_as_exactly_the_model_of_the_solver(bits: int, symmetric: bool) -> None:
    """And the latent weight moves no further than it must."""
    weight, start = problem(bits, symmetric=symmetric, scale_dtype=torch.bfloat16)
    module = rounded(weight, start)
    nearest = start.grid.solved(weight, start.solved.scale, start.solved.zero).codes
    assert not torch.equal(nearest, start.solved.codes)  # else there is nothing to move
    assert torch.equal(module.solved().codes, start.solved.codes)
    assert torch.equal(module.solved().scale, start.solved.scale)
    inputs = torch.randn(3, COLUMNS)
    expected = nn.functional.linear(inputs, start.solved.weight(), module.bias)
    assert torch.equal(module(inputs), expected)
    scale = start.solved.scale.repeat_interleave(SIZE, 1)
    moved = (module.weight.detach() - weight).abs() > 1e-6
    near = ((weight - start.solved.weight()) / scale).abs() <= qat.INSIDE
    assert not bool((moved & near).any())


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_textbook(symmetric: bool) -> None:
    """One weight at a time, in float64; beyond the range of the codes W has none and the scale another."""
    weight, start = problem(2, symmetric=symmetric)
    module = rounded(weight, start)
    with torch.no_grad():
        module.weight += 0.4 * torch.randn_like(weight)
        module.factor.uniform_(0.7, 1.3)
    inputs, slope = torch.randn(5, COLUMNS), torch.randn(5, ROWS)
    (module(inputs) * slope).sum().backward()
    into_weight = (slope.double().t() @ inputs.double()).tolist()

    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    of_factor = torch.zeros(ROWS, COLUMNS // SIZE, dtype=torch.float64)
    beyond = 0
    for r in range(ROWS):
        for j in range(COLUMNS):
            g = j // SIZE
            first, zero = float(start.solved.scale[r, g]), float(start.solved.zero[r, g])
            scale = first * module.factor[r, g].item()
            place = module.weight[r, j].item() / scale + zero
            code = min(max(round(place), 0), 3)
            inside = -0.5 < place < 3.5
            beyond += not inside
            expected[r, j] = into_weight[r][j] if inside else 0.0
            of_factor[r, g] += into_weight[r][j] * first * (code - zero - (place - zero if inside else 0.0))
    assert 0 < beyond < ROWS * COLUMNS
    torch.testing.assert_close(module.weight.grad, expected, check_dtype=False, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.factor.grad, of_factor, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_what_is_stored_is_what_ran() -> None:
    """Scales of the precision of the file included, after weights and scales have moved."""
    weight, start = problem(3, symmetric=False, scale_dtype=torch.float16)
    module = rounded(weight, start)
    with torch.no_grad():
        module.weight += 0.3 * torch.randn_like(weight)
        module.factor.uniform_(0.7, 1.3)
    solved = module.solved()
    assert torch.equal(solved.scale, solved.scale.half().float())
    assert not torch.equal(solved.codes, start.solved.codes)
    inputs = torch.randn(3, COLUMNS)
    assert torch.equal(module(inputs), nn.functional.linear(inputs, solved.weight(), module.bias))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (llama, ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")),
        (gpt2, ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn")),  # Conv1D: kept as [columns, rows]
    ],
)
def test_a_student_trains_rounded_and_ends_as_a_plain_model(make, names: tuple[str, ...]) -> None:
    """With the same parameters under the same names, the weights being what the codes stand for."""
    model, untouched = make().eval(), make().state_dict()
    before = {name: type(module) for name, module in model.named_modules()}
    starts = {}
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.weight.detach()
        weight = weight if isinstance(linear, nn.Linear) else weight.t()
        grid = IntGrid(4, True)
        eye = Statistics(torch.eye(weight.shape[1]))
        starts[name] = qat.Start(rtn.solve(weight.contiguous(), eye, grid, 16), grid)
    rounding = qat.Rounding(starts)
    rounding.prepare(model)
    ids = torch.randint(0, 50, (2, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    while_training = model(input_ids=ids).logits
    rounding.finish(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.state_dict().keys() == untouched.keys()
    torch.testing.assert_close(model(input_ids=ids).logits, while_training)
    assert rounding.solved.keys() == set(names)
    for name, solved in rounding.solved.items():
        linear = model.get_submodule(name)
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()
        assert torch.equal(weight, solved.weight())
        assert not torch.equal(solved.codes, starts[name].solved.codes) or bool(
            (solved.scale != starts[name].solved.scale).any()
        )


def test_a_code_can_be_anywhere_on_the_grid() -> None:
    """The start of a group of zeros and of weights far beyond the range."""
    weight = torch.zeros(1, 4)
    weight[0, 3] = 100.0
    solved = Solved(torch.tensor([[2, 2, 0, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    start = qat.Start(solved, IntGrid(2, True))
    place = qat.latent(weight, start) / 0.5 + 2
    assert place.tolist()[0] == pytest.approx([2, 2, 0.49, 3.49])
