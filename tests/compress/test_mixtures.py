"""Whole runs on mixtures of experts: what is written loads in plain transformers, and what would not is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MIXTURES, load, measured, reported, request, tokens, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmpare.compress import quantize
from llmpare.compress.batches import experts_at_once
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.estimate import process
from llmpare.compress.plan import plan_quantize
from llmpare.compress.progress import Silent
from llmpare.compress.report import markdown, schema
from llmpare.compress.request import LayerRule, QuantizeRequest, Scheme, TextSpec
from llmpare.compress.run import run_quantize

SCHEME = Scheme(4, 32)
FUSED = {"granitemoe", "gpt_oss"}  # one tensor on disk holds all experts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {family: write(folder / family / "model", family) for family in MIXTURES}


def asked(model: Path, form: str, **changes: Any) -> QuantizeRequest:
    return request(model, model.with_name(form), **{"format": form, "scheme": SCHEME, **changes})


def untaught(model: Path, form: str, **changes: Any) -> QuantizeRequest:
    """A run that looks at no text."""
    rounding = {"method": "rtn", "options": quantize.resolve("rtn", {}), "calibration": TextSpec("none", seqlen=64)}
    return asked(model, form, **{**rounding, **changes})


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_run_tells_the_truth_and_its_output_loads(family: str, models: dict[str, Path]) -> None:
    model = models[family]
    dense = asked(model, "dense")
    report = run_quantize(dense, Silent())
    again = measured(load(model), load(dense.out), model)
    assert reported(report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert again["kl"] > 1e-3
    before, after = tensors(model), tensors(dense.out)
    assert before.keys() == after.keys()
    changed = {linear.tensor for linear in plan_quantize(dense).quantized}
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == changed
    assert not any("router" in name or name.endswith(".gate.weight") for name in changed)

    experts = report["experts"]
    assert experts["mixtures"][-1]["block"] == 1
    for mixture in experts["mixtures"]:  # two experts for every one of 4 × 64 tokens
        assert sum(mixture["tokens"].values()) == 2 * 4 * 64
        assert mixture["borrowed"] == [int(e) for e, count in mixture["tokens"].items() if count < 128]
    short = [mixture for mixture in experts["mixtures"] if mixture["borrowed"]]
    assert [note["name"] for note in report["fallbacks"]] == [mixture["name"] for mixture in short]
    assert 0 < experts["borrowed_share"] < 1
    assert schema.validate(json.loads((dense.out / "report.json").read_text())) == []
    assert f"`{short[0]['name']}`" in markdown.render(report)

    packed = asked(model, "compressed-tensors")
    if family in FUSED:
        with pytest.raises(InputError, match="one tensor holds them all"):
            plan_quantize(packed)
        packed, dense = (
            untaught(model, form, rules=(LayerRule("experts", None),)) for form in (packed.format, "dense")
        )
        dense = replace(dense, out=dense.out.with_name("dense-2"))
        run_quantize(dense, Silent())
    run_quantize(packed, Silent())
    assert torch.equal(load(packed.out)(tokens()).logits, load(dense.out)(tokens()).logits)


def test_experts_learn_from_all_tokens_if_asked_to(models: dict[str, Path]) -> None:
    model = models["mixtral"]
    own = untaught(model, "compressed-tensors", calibration=asked(model, "dense").calibration)
    own = replace(own, out=own.out.with_name("own"))
    every = replace(own, out=own.out.with_name("every"), route_all=True, strict=True)
    reports = [run_quantize(each, Silent()) for each in (own, every)]
    assert reports[0]["experts"]["borrowed_share"] > 0
    assert reports[1]["experts"]["borrowed_share"] == 0
    assert reports[1]["experts"]["mixtures"][0]["tokens"] == reports[0]["experts"]["mixtures"][0]["tokens"]
    assert reports[1]["fallbacks"] == []
    assert reports[1]["passed"]
    before, after = (tensors(each.out) for each in (own, every))
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    strict = replace(own, strict=True)
    assert not run_quantize(strict, Silent())["passed"], "borrowing is a fallback"
    with pytest.raises(UsageError, match="has no mixture of experts"):
        plan_quantize(asked(write(model.parent / "llama", "llama"), "dense", route_all=True))


def test_a_scheme_of_their_own_for_experts(models: dict[str, Path]) -> None:
    model = models["qwen2_moe"]
    rules = (LayerRule(r"mlp\.experts", Scheme(8, 64)), LayerRule("self_attn", None))
    dense, packed = (untaught(model, form, rules=rules) for form in ("dense", "compressed-tensors"))
    dense, packed = (replace(each, out=each.out.with_name(f"{each.format}-8")) for each in (dense, packed))
    for each in (dense, packed):
        run_quantize(each, Silent())
    assert torch.equal(load(packed.out)(tokens()).logits, load(dense.out)(tokens()).logits)
    config = json.loads((packed.out / "config.json").read_text())["quantization_config"]
    ignored = [pattern for pattern in config["ignore"] if "gate" in pattern]
    assert len(ignored) == 2, "the router and the gate of the shared expert"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero points": ("qwen3_moe", {"scheme": Scheme(4, 32, False)}, "asymmetric experts"),
    "two schemes": ("qwen3_moe", {"rules": (LayerRule(r"experts\.3\.", Scheme(8)),)}, "here they are W4A16 g32, W8"),
    "two schemes by layer": ("mixtral", {"rules": (LayerRule(r"layers\.1\.", Scheme(8)),)}, "under one scheme"),
    "some dense": ("mixtral", {"rules": (LayerRule(r"experts\..*w2", None),)}, "here they are W4A16 g32, dense"),
    "all dense": ("qwen3_moe", {"rules": (LayerRule("experts", None),)}, "here they are dense"),
    "gptq": ("qwen3_moe", {"format": "gptq"}, "gptq format cannot store mixtures"),
    "tuned": ("qwen3_moe", {"method": "tuned"}, "--method tuned trains whole blocks"),
    "correction": ("olmoe", {"options": quantize.resolve("gptq", {"correction": 0.5})}, "--correction compares"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_loads_wrong_or_has_no_meaning_is_refused(case: str, models: dict[str, Path]) -> None:
    family, changes, says = REFUSED[case]
    form = changes.get("format", "compressed-tensors")
    options = {name: value for name, value in changes.items() if name != "format"}
    with pytest.raises((InputError, UsageError), match=says):
        plan_quantize(asked(models[family], form, **options))


def test_a_run_that_was_cut_short_goes_on(models: dict[str, Path]) -> None:
    """With the experts of the first block from the output, packed or as one tensor of all, and with less memory."""

    class Stop(Exception):
        pass

    class Once(Silent):
        def block(self, index: int, total: int, facts: Any) -> None:
            raise Stop

    forms = {"qwen3_moe": "compressed-tensors", "mixtral": "compressed-tensors", "gpt_oss": "dense"}
    for family, form in forms.items():
        whole = asked(models[family], form)
        whole = replace(whole, out=whole.out.with_name(f"whole-{form}"))
        run_quantize(whole, Silent())
        again = replace(whole, out=whole.out.with_name(f"again-{form}"))
        with pytest.raises(Stop):
            run_quantize(again, Once())
        least = plan_quantize(again).needs.least
        report = run_quantize(replace(again, max_memory=least), Silent())
        assert report["cost"]["predicted_memory_bytes"] == least < plan_quantize(again).needs.memory
        assert [block["resumed"] for block in report["blocks"]] == [True, False]
        assert report["cost"]["predicted_seconds"] >= report["blocks"][1]["seconds"], "the first that was worked on"
        assert len(report["experts"]["mixtures"]) == 2
        before, after = tensors(whole.out), tensors(again.out)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_experts_in_mxfp4(models: dict[str, Path], tmp_path: Path) -> None:
    """As gpt-oss is published: compressed like what transformers decodes, and what was measured is what loads."""
    low, twin = (shutil.copytree(models["gpt_oss"], tmp_path / name) for name in ("low", "twin"))
    generator, dense = torch.Generator().manual_seed(0), tensors(low)
    packed = dict(dense)
    for name in [name for name in dense if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = packed.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone()).contiguous()
    config = json.loads((low / "config.json").read_text())
    (low / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    for folder, held in ((low, packed), (twin, dense)):
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    first, second = (asked(model, f"{model.name}-out", format="dense") for model in (low, twin))
    report, other = (run_quantize(each, Silent()) for each in (first, second))
    assert report["source"]["scheme"] == "mxfp4 experts"
    assert report["experts"]["parameters"] == 2 * 4 * (3 * 128 * 128)
    assert report["fidelity"] == other["fidelity"]
    before, after = tensors(first.out), tensors(second.out)
    assert before.keys() == after.keys() == dense.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = measured(load(twin), load(first.out), twin)
    assert reported(report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)


def test_a_model_that_is_mostly_no_linears_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "llama")
    path = next(model.glob("*.safetensors"))
    held = load_file(path)
    held["model.layers.0.extra"] = torch.zeros(2 * sum(tensor.numel() for tensor in held.values()))
    save_file(held, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"only \d+% of the weights in the blocks of LlamaForCausalLM are linears"):
        plan_quantize(asked(model, "dense"))


def test_memory_is_planned_for_one_block_and_some_experts_at_once(tmp_path: Path) -> None:
    """More experts take more room for their weights, and for as many matrices as are solved together, but no more."""
    needs = []
    for count in (4, 64):
        model = write(tmp_path / f"{count}", "qwen3_moe", settings={"num_experts": count})
        needs.append(plan_quantize(asked(model, "dense")).needs)
    few, many = needs
    assert many.statistics == 4 * 128**2 * (64 + 1)
    assert [experts_at_once(columns, "cpu") for columns in (128, 768, 2048, 14336)] == [256, 7, 1, 1]
    assert many.waiting_per_token == few.waiting_per_token
    assert many.forward_per_token == few.forward_per_token
    block = 64 * 3 * 128 * 128 * 2
    assert many.block - few.block < 12 * block
    assert many.solving <= 4 * (2 + 13) * block  # copies of weights, as of any other linears
    assert many.least < process() + 2**28
