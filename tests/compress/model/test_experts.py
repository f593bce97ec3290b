"""Mixtures of experts: what is found, what each expert learns from, and what a loop of ours may stand in for."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import MIXTURES, load, read, skeleton, tokens, write
from torch import Tensor, nn

from llmpare.compress import collect, routing
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError, UnsupportedError
from llmpare.compress.grid import Statistics
from llmpare.compress.model.experts import Mixture, Slot, check_filled
from llmpare.compress.model.layout import layout
from llmpare.compress.model.replay import Replay
from llmpare.compress.streams import Stream

ROUTERS = {
    "mixtral": {"block_sparse_moe.gate"},
    "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"},
    "granitemoe": {"block_sparse_moe.router.layer"},
    "gpt_oss": {"mlp.router"},
}


@pytest.fixture(scope="module", params=MIXTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write(tmp_path_factory.mktemp("mixture") / "model", request.param)


def loaded(folder: Path, index: int) -> tuple[Any, Any]:
    """Layout and skeleton of a checkpoint with one block in place; block 0 has been, to learn how blocks behave."""
    with Checkpoint.open(folder) as checkpoint:
        found, made = layout(checkpoint), skeleton(checkpoint)
        for each in {0, index}:
            made.place(read(checkpoint, found.blocks[each]))
    return found, made


def test_routers_are_no_linears(model: tuple[str, Path]) -> None:
    family, folder = model
    with Checkpoint.open(folder) as checkpoint:
        found = layout(checkpoint)
    names = {gate.name.partition(".1.")[2] for gate in found.gates if gate.block == 1}
    assert names == ROUTERS.get(family, {"mlp.gate"})
    experts = [linear for linear in found.of_block(1) if linear.expert is not None]
    count = 8 if family in ("olmoe", "deepseek_v3") else 4
    assert {linear.expert.index for linear in experts if linear.expert} == set(range(count))
    assert {linear.expert.count for linear in experts if linear.expert} == {count}
    assert sum(linear.rows * linear.columns for linear in experts) == count * 3 * 128 * 128


def test_replay_is_the_models_own_forward(model: tuple[str, Path]) -> None:
    """Block by block, bit for bit."""
    with Checkpoint.open(model[1]) as checkpoint:
        found, made = layout(checkpoint), skeleton(checkpoint)
        made.place(read(checkpoint, found.blocks[0]))
        replay = Replay(made)
        ids = tokens()
        hidden = replay.embed(ids)
        for index, names in enumerate(found.blocks):
            made.place(read(checkpoint, names))
            with torch.no_grad():
                hidden = replay.run(index, hidden)
            made.unload(index)
    own = load(model[1])
    last: list[Tensor] = []
    list_of_blocks = max(
        (m for m in own.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters())
    )
    list_of_blocks[-1].register_forward_hook(
        lambda m, args, out: last.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        own(ids, use_cache=False)
    assert torch.equal(hidden, last[0])


class Watched:
    """What the router chose and what experts were called with, recorded by hooks on transformers' own modules."""

    def __init__(self, block: nn.Module) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        module = next(m for m in block.modules() if type(m).__name__.endswith("Experts"))
        self.handle = module.register_forward_pre_hook(
            lambda m, args: self.calls.append((args[0].clone(), args[1].clone()))
        )


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("together", [True, False])
def test_every_expert_learns_from_its_own_tokens(model: tuple[str, Path], everything: bool, together: bool) -> None:
    """Counts as the router chose, matrices as a textbook would add them up in float64."""
    found, made = loaded(model[1], 1)
    replay = Replay(made)
    linears = [linear for linear in found.of_block(1) if linear.expert is not None]
    inputs = collect.Inputs({}, made.mixtures(linears), everything)
    stream = Stream.enter(tokens(4, 32), replay, 2)
    seen = Watched(made.blocks[1])
    with torch.no_grad():
        for hidden in stream.hidden:
            replay.run(1, hidden)
    seen.handle.remove()
    gather = collect.sequential if together else collect.parallel
    more: dict[str, Any] = {} if together else {"dense": None, "with_drift": False}
    learned: dict[str, Statistics] = {}
    for names, statistics in chain.from_iterable(gather(replay, 1, inputs, stream, **more)):
        learned |= dict.fromkeys(names, statistics)
    assert learned.keys() == {linear.name for linear in linears}

    module = inputs.mixtures[0].module
    x = torch.cat([hidden for hidden, _ in seen.calls]).float()
    chosen = torch.cat([index for _, index in seen.calls])
    routed = [(chosen == expert).any(1) for expert in range(len(module.down_proj))]
    inner = [textbook(module, expert, x if everything else x[routed[expert]]) for expert in range(len(routed))]
    for linear in linears:
        assert linear.expert is not None
        own = learned[linear.name]
        count = int(routed[linear.expert.index].sum())
        assert own.tokens == count
        outer = linear.columns == 128 and "down" in linear.name or "w2" in linear.name or "output" in linear.name
        if outer:
            rows, pool = inner[linear.expert.index], torch.cat(inner)
        else:
            rows, pool = (x if everything else x[routed[linear.expert.index]]), x
        rows, pool = rows.double(), pool.double()
        gram = rows.t() @ rows
        missing = 0 if everything else max(0, 128 - len(rows))
        assert own.borrowed == missing
        gram = (gram + missing / len(pool) * (pool.t() @ pool)) / (len(rows) + missing)
        precision = 2e-2 if x.dtype != module.down_proj.dtype else 1e-4  # of activations in half precision
        assert (own.gram - gram).norm() < precision * gram.norm()


def textbook(module: Any, expert: int, x: Tensor) -> Tensor:
    """What the expert's last linear reads, [tokens, columns]."""
    weight = module.gate_up_proj[expert].float()
    if module.is_transposed:  # gpt-oss
        mixed = x @ weight + module.gate_up_proj_bias[expert].float()
        gate, up = mixed[:, ::2].clamp(max=module.limit), mixed[:, 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = (x @ weight.t()).split(128, dim=1)
    return nn.functional.silu(gate) * up


def test_an_expert_without_tokens_is_named() -> None:
    x = torch.randn(6, 4)
    parts = {0: x[:4], 1: x[:0], 2: x[4:]}

    def flow(everything: bool = False) -> Any:
        return routing.Routed([4, 0, 2], lambda e: x if everything else parts[e], lambda: iter([x]))

    readers = {0: ["e.0"], 1: ["e.1"], 2: ["e.2"]}
    learned = list(routing.learn([flow()], readers, everything=False))
    assert len(learned) == 1  # small enough to be solved together
    found = {names[0]: statistics for names, statistics in learned[0]}
    assert [(each.tokens, each.borrowed) for each in found.values()] == [(4, 0), (0, 4), (2, 2)]
    assert torch.allclose(found["e.1"].gram, x.t() @ x / 6, atol=1e-6)
    own = parts[2].t() @ parts[2]
    assert torch.allclose(found["e.2"].gram, (own + 2 / 6 * x.t() @ x) / 4, atol=1e-6)
    grams = routing.Grams([0, 1, 2])
    grams.add(flow())
    learned = chain.from_iterable(grams.statistics(readers, everything=False))
    again = {names[0]: statistics for names, statistics in learned}
    for name, statistics in again.items():
        assert torch.allclose(statistics.gram, found[name].gram, atol=1e-6)
    for _, statistics in chain.from_iterable(routing.learn([flow(True)], readers, everything=True)):
        assert statistics.borrowed == 0
        assert torch.allclose(statistics.gram, x.t() @ x / 6, atol=1e-6)


# --- what is refused


class Odd(nn.Module):
    """Experts that do something to their output that no attribute tells."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 6, 4))
        self.is_transposed = self.has_bias = False
        self.has_gate = True
        self.factor = factor

    def _apply_gate(self, x: Tensor) -> Tensor:
        return x[:, :4] * x[:, 4:]

    def forward(self, hidden: Tensor, chosen: Tensor, gain: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token, (experts, gains) in enumerate(zip(chosen.tolist(), gain, strict=True)):
            for expert, weight in zip(experts, gains, strict=True):
                mid = self._apply_gate(hidden[token][None] @ self.gate_up_proj[expert].t())
                out[token] += (mid @ self.down_proj[expert].t())[0] * weight
        return out * self.factor


def test_a_module_that_computes_something_else_is_refused() -> None:
    hidden, chosen, gain = torch.randn(5, 6), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    with torch.no_grad():
        for factor in (1.0, 1.01):
            module = Odd(factor)
            own = module(hidden, chosen, gain)
            with Mixture("some.experts", module).opened():
                assert torch.allclose(module(hidden, chosen, gain), own / factor, atol=1e-5)
            assert torch.equal(module(hidden, chosen, gain), own)
        with (
            Mixture("some.experts", module).opened(check=True),
            pytest.raises(UnsupportedError, match=r"some\.experts: experts of a Odd compute something"),
        ):
            module(hidden, chosen, gain)


def test_a_checkpoint_without_some_experts_is_refused() -> None:
    slots = {f"{e}.{part}": Slot("w", e, part * 2, 2) for e in range(3) for part in range(2)}
    check_filled(slots, {"w": (3, 4, 5)})
    del slots["1.1"]
    with pytest.raises(InputError, match="lacks weights of w: experts 1$"):
        check_filled(slots, {"w": (3, 4, 5)})


def test_the_interface_of_transformers_that_all_this_rests_on() -> None:
    """Its experts say how they hold their weights, and are called with tokens, choices and gains, in this order."""
    module = next(
        m
        for m in transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model("gpt_oss", **{**MIXTURES["gpt_oss"].settings, "vocab_size": 64})
        ).modules()
        if type(m).__name__ == "GptOssExperts"
    )
    assert (module.is_transposed, module.has_bias, module.has_gate) == (True, True, True)
    assert module._apply_gate(torch.zeros(3, 8)).shape == (3, 4)
    assert module(torch.zeros(2, 128), torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2)).shape == (2, 128)
