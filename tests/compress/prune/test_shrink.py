"""Structured pruning from end to end, on tiny random models of every family."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmpare.compress.errors import InputError, UnsupportedError, UsageError
from llmpare.compress.plan import plan_prune
from llmpare.compress.progress import Silent
from llmpare.compress.prune.cut import Cut, ShrinkRequest
from llmpare.compress.request import NO_TEXT, TextSpec
from llmpare.compress.run import run_prune
from tests import families, tiny

NARROW = {"llama": "heads", "qwen3": "heads", "gemma3_text": "heads", "phi3": "heads"}
FAMILIES = (*NARROW, "opt", "gpt2", "gpt_neox")


def request(model: Path, out: Path, **cut: Any) -> ShrinkRequest:
    return ShrinkRequest(
        model=str(model),
        out=out,
        calibration=TextSpec(str(families.text(model, "calibration")), nsamples=4, seqlen=families.LENGTH),
        evaluation=TextSpec(str(families.text(model, "evaluation")), nsamples=2, seqlen=families.LENGTH),
        device="cpu",
        dtype=families.own_dtype(model),
        cut=Cut(**{"round_to": 32, **cut}),
    )


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_ran_and_generates(family: str, tmp_path: Path) -> None:
    model, out = families.write(tmp_path / "model", family), tmp_path / "out"
    cut: dict[str, Any] = {"ffn": 0.75, NARROW[family]: 0.5} if family in NARROW else {"ffn": 0.75}
    report = run_prune(request(model, out, **cut), Silent())
    dense, small = families.load(model), families.load(out)
    assert families.reported(report["fidelity"]) == pytest.approx(families.measured(dense, small, model), rel=1e-4)
    kept = report["structure"]["parameters"]["kept"]
    assert kept == sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert small.generate(families.tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert report["structure"]["ffn_channels"] in config(out).values()
    for block in report["blocks"]:
        for linear in block["linears"]:
            assert 0 <= linear["relative_error"] < linear["error_removed"]
    if family in NARROW:
        assert (config(out)["num_attention_heads"], config(out)["num_key_value_heads"]) == (2, 1)
        assert config(out)["head_dim"] == 32


def test_keeping_everything_gives_the_input_back(tmp_path: Path) -> None:
    model, out = families.write(tmp_path / "model", "qwen3"), tmp_path / "out"
    report = run_prune(request(model, out, ffn=1.0, heads=1.0, layers=2), Silent())
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    before = {k: v for f in model.glob("*.safetensors") for k, v in load_file(f).items()}
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report["fidelity"]["kl"]["mean"] == 0


def test_channels_and_heads_that_add_nothing_cost_nothing(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama", dtype=torch.float32)
    weights = load_file(model / "model.safetensors")
    for index in range(2):
        block = f"model.layers.{index}"
        for name in ("gate", "up"):
            weight = weights[f"{block}.mlp.{name}_proj.weight"]
            weight[1:128:2] = weight[0:128:2]  # every other channel of the first half says what its neighbour says
        weights[f"{block}.mlp.down_proj.weight"][:, 192:] = 0  # and the last ones are not listened to
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            weight = weights[f"{block}.self_attn.{name}_proj.weight"]
            weight[rows:] = weight[:rows]  # the second KV group is the first
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    settings = request(model, tmp_path / "out", ffn=0.5, heads=0.5)
    report = run_prune(replace(settings, calibration=replace(settings.calibration, nsamples=12)), Silent())
    for block in report["blocks"]:
        assert block["relative_error"] < 1e-5
        assert all(linear["relative_error"] < 1e-5 for linear in block["linears"])
    assert report["fidelity"]["kl"]["mean"] < 1e-5


@pytest.mark.parametrize("together", [True, False])
def test_both_ways_to_collect_lose_less_than_removal_alone(together: bool, tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama", settings={"num_hidden_layers": 3})
    settings = request(model, tmp_path / "out", ffn=0.75, heads=0.5)
    # little memory: the windows cannot all wait inside a block
    report = run_prune(settings if together else replace(settings, max_memory=2**30), Silent())
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    assert len(linears) == 6
    assert all(linear["relative_error"] < 0.8 * linear["error_removed"] for linear in linears)


def test_blocks_leave_with_their_entry_in_every_list(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = families.write(tmp_path / "model", "gemma3_text", settings={"num_hidden_layers": 5, "layer_types": kinds})
    out = tmp_path / "out"
    report = run_prune(request(model, out, layers=4), Silent())
    kept = report["structure"]["blocks"]
    assert len(kept) == 4
    assert {0, 1, 4} < set(kept)
    assert config(out)["num_hidden_layers"] == 4
    assert config(out)["layer_types"] == [kinds[index] for index in kept]
    assert [record["removed"] for record in report["blocks"]] == [index not in kept for index in range(5)]
    measured = families.measured(families.load(model), families.load(out), model)
    assert families.reported(report["fidelity"]) == pytest.approx(measured, rel=1e-4)
    before = {k: v for f in model.glob("*.safetensors") for k, v in load_file(f).items()}
    after = load_file(out / "model.safetensors")
    for place, index in enumerate(kept):
        name = "mlp.up_proj.weight"
        assert torch.equal(after[f"model.layers.{place}.{name}"], before[f"model.layers.{index}.{name}"])


def test_named_blocks_leave_and_the_rest_makes_up_for_them(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama", settings={"num_hidden_layers": 4})
    report = run_prune(request(model, tmp_path / "out", drop_layers=(0, 2), ffn=0.75), Silent())
    assert report["structure"]["blocks"] == [1, 3]
    assert report["structure"]["healing"]["needed"]
    assert "llmpare distill" in report["structure"]["healing"]["command"]
    small = families.load(tmp_path / "out")
    measured = families.measured(families.load(model), small, model)
    assert families.reported(report["fidelity"]) == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"ffn": 0.5, "heads": 0.5, "layers": 4}], ids=["alone", "with all else"])
def test_residual_channels_leave_everywhere(more: dict[str, Any], tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "qwen3", dtype=torch.float32, settings={"num_hidden_layers": 5})
    out = tmp_path / "out"
    report = run_prune(request(model, out, hidden=0.75, **more), Silent())
    small = families.load(out)
    assert config(out)["hidden_size"] == 96
    assert config(out)["head_dim"] == 32
    measured = families.measured(families.load(model), small, model)
    assert families.reported(report["fidelity"]) == pytest.approx(measured, rel=1e-4)
    for block in report["blocks"]:
        assert block["removed"] or len(block["linears"]) == 7
        assert all(linear["relative_error"] < linear["error_removed"] for linear in block["linears"])


def test_residual_channels_that_hold_nothing_leave_at_no_cost(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama", dtype=torch.float32)
    weights = load_file(model / "model.safetensors")
    empty = slice(5, 37)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[empty] = 0
        elif name == "model.embed_tokens.weight":
            weight[:, empty] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    report = run_prune(request(model, tmp_path / "out", hidden=0.75), Silent())
    assert report["fidelity"]["kl"]["mean"] < 1e-4
    ratio = report["blocks"][-1]["relative_error"]
    assert ratio < 1e-4


def test_norms_that_take_off_the_mean(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "cohere")
    report = run_prune(request(model, tmp_path / "out", hidden=0.75), Silent())
    assert report["size"]["linear_bits_per_weight"] is None  # they are as wide as before, of fewer weights
    measured = families.measured(families.load(model), families.load(tmp_path / "out"), model)
    assert families.reported(report["fidelity"]) == pytest.approx(measured, rel=1e-4)


def test_a_family_that_scales_embeddings_by_the_width_is_refused_by_name(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "gemma3_text")
    with pytest.raises(UnsupportedError, match="Gemma3ForCausalLM scales its embeddings"):
        run_prune(request(model, tmp_path / "out", hidden=0.75), Silent())


def test_a_target_is_met_by_what_costs_least(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama", settings={"num_hidden_layers": 4})
    whole = plan_prune(request(model, tmp_path / "out")).parameters
    report = run_prune(request(model, tmp_path / "out", target_params=whole - 90_000), Silent())
    found = report["structure"]
    assert whole - 200_000 < found["parameters"]["kept"] <= whole - 90_000
    assert found["search"]["expected_kl"] > 0
    for curve in found["search"]["measured"].values():
        assert curve[-1]["kl"] == 0
        assert all(a["kl"] > b["kl"] for a, b in zip(curve, curve[1:], strict=False))
    small = families.load(tmp_path / "out")
    assert sum(p.numel() for p in small.parameters()) == found["parameters"]["kept"]


def test_as_much_is_removed_as_the_divergence_allows(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "opt")
    report = run_prune(request(model, tmp_path / "out", max_kl=0.01), Silent())
    found = report["structure"]
    assert found["parameters"]["removed_share"] > 0.02
    assert found["search"]["expected_kl"] <= 0.01
    assert report["fidelity"]["kl"]["mean"] < 0.02


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama")
    with pytest.raises(InputError, match="parameters remain"):
        run_prune(request(model, tmp_path / "out", target_params=1000), Silent())


@pytest.mark.parametrize(
    ("family", "cut", "error", "says"),
    [
        ("opt", {"heads": 0.5}, UnsupportedError, "OPTForCausalLM takes the size of heads"),
        ("gpt_neox", {"heads": 0.5}, UnsupportedError, "GPTNeoXForCausalLM takes the size of heads"),
        ("opt", {"hidden": 0.5}, UnsupportedError, "OPTForCausalLM takes the size of heads"),
        ("llama", {"experts": 4}, UnsupportedError, "LlamaForCausalLM has no experts"),
        ("llama", {"drop_layers": (7,)}, UsageError, "blocks 0 to 1"),
        ("llama", {"layers": 1}, UsageError, "the model has 2"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan_by_name(
    family: str, cut: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    model = families.write(tmp_path / "model", family)
    with pytest.raises(error, match=says):
        plan_prune(request(model, tmp_path / "out", **cut))


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    model = families.write(tmp_path / "model", "llama", settings=heads)
    with pytest.raises(InputError, match="6 heads do not divide 128") as caught:
        plan_prune(request(model, tmp_path / "out", heads=0.75))
    assert "0.25, 0.5" in str(caught.value.hint)


def test_text_is_needed(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama")
    with pytest.raises(UsageError, match="needs calibration text"):
        plan_prune(replace(request(model, tmp_path / "out", ffn=0.5), calibration=TextSpec(NO_TEXT)))


def test_the_plan_shows_the_new_shapes(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "phi3")
    plan = plan_prune(request(model, tmp_path / "out", ffn=0.7, heads=0.5))
    text = "\n".join(plan.lines())
    assert "cut to [384, 128]" in text  # gate and up in one: 2 · 192, the next multiple of 32
    assert "cut to [128, 192]" in text
    assert "cut to [128, 128]" in text  # query, key and value of one group: (2 + 1 + 1) · 32
    assert plan.to_json()["kept_parameters"] < plan.parameters


def test_blocks_whose_kind_follows_from_their_number_leave_only_if_the_rest_keeps_its_own(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "deepseek_v3", settings={"num_hidden_layers": 4})
    with pytest.raises(UnsupportedError, match=r"fits no config\.json.*mlp\.experts") as caught:
        run_prune(request(model, tmp_path / "out", drop_layers=(0,)), Silent())  # the one without experts
    assert "leave out other blocks" in str(caught.value.hint)
    run_prune(request(model, tmp_path / "out", drop_layers=(2,)), Silent())
    assert config(tmp_path / "out")["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"ffn": 0.75}, []),
        ({"ffn": 0.55, "round_to": 128}, ["--ffn 0.55 keeps 256 of 256 channels, 100%: --round-to makes finer steps"]),
        ({"ffn": 0.5, "heads": 0.6}, ["--heads 0.6 keeps 2 of 2 groups of heads, 100%"]),
    ],
)
def test_more_than_was_asked_for_is_not_kept_without_a_word(
    cut: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    model = families.write(tmp_path / "model", "llama")
    assert list(plan_prune(request(model, tmp_path / "out", **cut)).warnings) == said


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = families.write(tmp_path / "model", "llama", settings={"num_hidden_layers": 4})
    settings = {"ffn": 0.75, "heads": 0.5, "layers": 4}
    run_prune(request(model, tmp_path / "whole", **settings), Silent())

    class Interrupt(Silent):
        def block(self, index: int, total: int, facts: Any) -> None:
            if index == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_prune(request(model, tmp_path / "parts", **settings), Interrupt())
    report = run_prune(request(model, tmp_path / "parts", **settings), Silent())
    assert [block["resumed"] for block in report["blocks"]] == [True, True, False, False]
    assert tiny.contents(tmp_path / "whole").keys() == tiny.contents(tmp_path / "parts").keys()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
