"""Whole experts removed: the output is the original with the rows of the others gone, and loads as such."""

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import load, measured, reported, tokens, write
from safetensors.torch import load_file, save_file
from torch import nn

from llmpare.compress import prune
from llmpare.compress.errors import UnsupportedError, UsageError
from llmpare.compress.plan import plan_prune
from llmpare.compress.progress import Silent
from llmpare.compress.prune.cut import Cut, ShrinkRequest
from llmpare.compress.prune.drop import choose
from llmpare.compress.prune.request import MaskRequest, parse_pattern
from llmpare.compress.report import html, markdown, schema
from llmpare.compress.request import Scheme
from llmpare.compress.run import run_prune

COUNTS = {"olmoe": 8, "deepseek_v3": 8}


def common(model: Path, out: Path) -> dict[str, Any]:
    like = families.request(model, out)
    return {name: vars(like)[name] for name in ("model", "out", "calibration", "evaluation", "device", "dtype")}


def request(model: Path, out: Path, **cut: Any) -> ShrinkRequest:
    return ShrinkRequest(**common(model, out), cut=Cut(**cut))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss"])
def test_what_remains_is_the_original_without_the_others(family: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", family)
    with_bias(model)
    count = COUNTS.get(family, 4)
    keep = count // 2 + (count == 8) * 2
    report = run_prune(request(model, tmp_path / "out", experts=keep), Silent())
    assert reported(report["fidelity"]) == pytest.approx(
        measured(load(model), load(tmp_path / "out"), model), rel=1e-5, abs=1e-6
    )
    assert schema.validate(json.loads((tmp_path / "out" / "report.json").read_text())) == []
    assert f"{keep}" in markdown.render(report)
    assert html.render(report)
    experts = report["structure"]["experts"]
    assert (experts["dense"], experts["kept"]) == (count, keep)

    by_hand = load(model)
    mixtures = [m for m in by_hand.modules() if "is_transposed" in vars(m)]
    routers = [m for m in by_hand.modules() if type(m).__name__.lower().endswith("topkrouter")]
    assert len(mixtures) == len(routers) == len(experts["mixtures"])
    for module, router, told in zip(mixtures, routers, experts["mixtures"], strict=True):
        assert told["kept"] == sorted(told["kept"])
        assert sum(told["mass"]) == pytest.approx(1, abs=1e-6)
        if family != "deepseek_v3":
            assert min(told["mass"][e] for e in told["kept"]) >= max(
                mass for e, mass in enumerate(told["mass"]) if e not in told["kept"]
            )
        else:
            assert sum(e < 4 for e in told["kept"]) == keep // 2, "groups stay equally large"
        for each in (module, router):
            for parts in (each._parameters, each._buffers):
                for name, whole in parts.items():
                    if whole is not None:
                        parts[name] = cut(whole, told["kept"])
            each.num_experts = keep
    with torch.no_grad():
        assert torch.equal(by_hand(tokens()).logits, load(tmp_path / "out")(tokens()).logits)


def cut(whole: torch.Tensor, kept: list[int]) -> Any:
    part = whole[kept].clone()
    return nn.Parameter(part, requires_grad=False) if isinstance(whole, nn.Parameter) else part


def with_bias(model: Path) -> None:
    """Gives routers corrections that are not all zero."""
    for path in model.glob("*.safetensors"):
        held = load_file(path)
        for name, tensor in held.items():
            if "correction_bias" in name:
                held[name] = torch.linspace(-0.1, 0.1, len(tensor))
        save_file(held, path, {"format": "pt"})


def test_mass_is_what_experts_add(tmp_path: Path) -> None:
    """Worked out again with transformers' own modules, one expert at a time."""
    model = write(tmp_path / "model", "mixtral", dtype=torch.float32)
    report = run_prune(request(model, tmp_path / "out", experts=3), Silent())
    from llmpare.compress import calibration
    from llmpare.compress.tokenizer import load_tokenizer

    spec = families.request(model, model).calibration
    text = calibration.load(
        spec, load_tokenizer(model), vocab_size=families.VOCABULARY, part="calibration", max_length=families.LENGTH
    )
    own = load(model)
    module = own.model.layers[0].mlp.experts
    mass = torch.zeros(4)

    def see(experts: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        hidden, chosen, gain = args
        for expert in range(4):
            alone = type(experts).forward(experts, hidden, chosen, gain * (chosen == expert))
            mass[expert] += alone.square().sum()

    module.register_forward_hook(see)
    with torch.no_grad():
        own(torch.from_numpy(text.ids))
    told = report["structure"]["experts"]["mixtures"][0]["mass"]
    assert told == pytest.approx((mass / mass.sum()).tolist(), rel=1e-4)


def test_the_most_of_every_group_in_their_order() -> None:
    mass = torch.tensor([3.0, 9.0, 1.0, 9.0, 0.0, 0.0, 0.0, 0.5])
    assert choose(mass, 4, 1) == [0, 1, 2, 3]
    assert choose(mass, 4, 2) == [1, 3, 4, 7]
    assert choose(torch.zeros(4), 2, 1) == [0, 1]


@pytest.mark.parametrize(
    ("family", "asked", "error", "says"),
    [
        ("llama", {"experts": 2}, UnsupportedError, "LlamaForCausalLM has no experts"),
        ("mixtral", {"experts": 4}, UsageError, "there are 4, and 2 of them run for every token"),
        ("mixtral", {"experts": 1}, UsageError, "there are 4, and 2 of them run for every token"),
        ("deepseek_v3", {"experts": 5}, UsageError, "2 groups, which must stay equally large"),
        ("mixtral", {"experts": 2, "layers": 1}, UsageError, "--experts and --layers in one run"),
        ("mixtral", {"ffn": 0.5}, UnsupportedError, "the feed-forward network is not one that can be read off"),
    ],
)
def test_what_cannot_be_is_refused(
    family: str, asked: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", family)
    with pytest.raises(error, match=says):
        plan_prune(request(model, tmp_path / "out", **asked))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_blocks_with_experts_can_leave(family: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", family, settings={"num_hidden_layers": 3})
    report = run_prune(request(model, tmp_path / "out", drop_layers=(1,)), Silent())
    again = measured(load(model), load(tmp_path / "out"), model)
    assert reported(report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        ("mixtral", "wanda", {"pattern": parse_pattern("2:4")}),
        ("gpt_oss", "sparsegpt", {"sparsity": 0.5}),
        ("granitemoe", "alps", {"sparsity": 0.5}),
        ("qwen2_moe", "sparsegpt", {"sparsity": 0.5, "then": Scheme(4, 32)}),
    ],
)
def test_masks_on_experts(family: str, method: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Half of every expert's weights are zero on disk, and the output does what the report says."""
    model = write(tmp_path / "model", family)
    asked = MaskRequest(**common(model, tmp_path / "out"), method=method, options=prune.resolve(method, {}), **more)
    report = run_prune(asked, Silent())
    made = load(tmp_path / "out")
    made(tokens())
    again = measured(load(model), made, model)
    assert reported(report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert report["mask"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["experts"]["mixtures"][0]["tokens"]
    for module in made.modules():
        if "is_transposed" in vars(module):
            for whole in (module.gate_up_proj, module.down_proj):
                assert ((whole == 0).float().mean(dim=(1, 2)) - 0.5).abs().max() < 0.02
