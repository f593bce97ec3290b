"""Whole runs on every family: what is written, what loads it, and whether the report tells the truth about it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, load, measured, reported, request, save, tokens, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BartConfig, BartForCausalLM

from llmpare.compress import formats
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Linear
from llmpare.compress.plan import plan_quantize
from llmpare.compress.progress import Silent
from llmpare.compress.report import html
from llmpare.compress.request import AUTO, LayerRule, QuantizeRequest, Scheme
from llmpare.compress.run import run_quantize

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in FAMILIES},
    "llama, tied, fp16, sharded": {"family": "llama", "tied": True, "dtype": torch.float16, "sharded": True},
    "qwen3, tied, fp32": {"family": "qwen3", "tied": True, "dtype": torch.float32, "sharded": False},
    "gemma2, untied": {"family": "gemma2", "tied": False},
    "gpt_neox, bf16, sharded": {"family": "gpt_neox", "dtype": torch.bfloat16, "sharded": True},
    "phi3, bf16": {"family": "phi3", "dtype": torch.bfloat16},
    "opt, untied": {"family": "opt", "tied": False},
}
SCHEME = Scheme(4, 32)


@dataclass(frozen=True)
class Run:
    model: Path
    request: QuantizeRequest
    report: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.request.out

    def tensors(self, folder: Path | None = None) -> dict[str, Tensor]:
        """All tensors of the output, or of another folder."""
        found: dict[str, Tensor] = {}
        for path in sorted((folder or self.out).glob("*.safetensors")):
            found.update(load_file(path))
        return found


@pytest.fixture(autouse=True, scope="module")
def without_page() -> Iterator[None]:
    """The page takes longer than the run; tests/compress/report look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "render", lambda report: "")
        yield


def run(model: Path, form: str, **changes: Any) -> Run:
    asked = request(model, model.with_name(form), format=form, **{"scheme": SCHEME, **changes})
    planned, report = plan_quantize(asked).file_bytes, run_quantize(asked, Silent())
    weights = [path for path in asked.out.iterdir() if ".safetensors" in path.name]
    assert sum(path.stat().st_size for path in weights) == planned, "planned to the byte, in every format"
    assert planned == report["cost"]["weight_files_bytes"] == report["cost"]["predicted_weight_files_bytes"]
    return Run(model, asked, report)


@pytest.fixture(scope="module", params=VARIANTS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose output is the dequantized weights; other formats are compared with it."""
    return run(write(tmp_path_factory.mktemp("family") / "model", **VARIANTS[request.param]), "dense")


def test_the_report_is_about_what_was_written(dense: Run) -> None:
    """Perplexity, divergence and agreement, worked out again from the output by transformers alone."""
    again = measured(load(dense.model), load(dense.out), dense.model)
    assert reported(dense.report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert again["kl"] > 1e-4
    assert dense.report["fidelity"]["tokens"] == 2 * 63
    assert dense.report["passed"] is True
    assert dense.report["fallbacks"] == []
    errors = [linear["relative_error"] for block in dense.report["blocks"] for linear in block["linears"]]
    assert len(errors) == len(plan_quantize(dense.request).quantized)
    assert all(0 < error < 0.05 for error in errors)


def test_only_linears_change(dense: Run) -> None:
    before, after = dense.tensors(dense.model), dense.tensors()
    changed = {linear.weight for linear in plan_quantize(dense.request).quantized}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor) != (name in changed), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        if (dense.model / name).exists():
            assert (dense.out / name).read_bytes() == (dense.model / name).read_bytes()


def test_packed_codes_are_those_of_the_dense_output(dense: Run) -> None:
    """And load as such in plain transformers, with logits that are equal to the last bit."""
    if dense.report["source"]["architecture"] == "GPT2LMHeadModel":
        with pytest.raises(
            InputError, match=r"compressed-tensors cannot store transformer\.h\.0\.attn\.c_attn: it is a Conv1D"
        ):
            run(dense.model, "compressed-tensors")
        assert not dense.model.with_name("compressed-tensors").exists()
        return
    packed = run(dense.model, "compressed-tensors")
    stored, weights = packed.tensors(), dense.tensors()
    for linear, scheme in plan_quantize(packed.request).quantized.items():
        decoded = formats.find("compressed-tensors").decode(linear, scheme, stored)
        assert torch.equal(decoded.to(weights[linear.weight].dtype), weights[linear.weight])
    kept = {name for name in stored if not name.endswith(("_packed", "_scale", "_shape"))}
    assert kept == weights.keys() - {linear.weight for linear in plan_quantize(packed.request).quantized}
    assert all(torch.equal(stored[name], weights[name]) for name in kept)
    assert reported(packed.report["fidelity"]) == reported(dense.report["fidelity"])

    written = json.loads((packed.out / "config.json").read_text())
    assert written.pop("quantization_config")["ignore"] == ["lm_head"]
    assert written == json.loads((packed.model / "config.json").read_text())
    loaded, ids = load(packed.out), tokens()
    assert torch.equal(loaded(ids).logits, load(dense.out)(ids).logits)


def test_gptq_stores_the_same_codes(dense: Run) -> None:
    """Where the model's own precision is that of the format's scales; elsewhere scales differ by their rounding."""
    packed = run(dense.model, "gptq")
    stored, weights = packed.tensors(), dense.tensors()
    form = formats.find("gptq")
    quantized = plan_quantize(packed.request).quantized
    assert len(quantized) == len(plan_quantize(dense.request).quantized)
    for linear, scheme in quantized.items():
        weight = weights[linear.weight]
        decoded = form.decode(linear, scheme, stored).to(weight.dtype)
        if weight.dtype == torch.float16:
            assert torch.equal(decoded, weight.t() if linear.transposed else weight)
    filled = load(dense.model)
    filled.load_state_dict({**filled.state_dict(), **in_modules(filled, stored, quantized)})
    assert reported(packed.report["fidelity"]) == pytest.approx(
        measured(load(dense.model), filled, dense.model), rel=1e-5, abs=1e-6
    )
    written = json.loads((packed.out / "config.json").read_text())
    assert written["quantization_config"] == json.loads((packed.out / "quantize_config.json").read_text())
    if "rope_theta" in written.get("rope_parameters", {}):
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]


def in_modules(model: torch.nn.Module, stored: dict[str, Tensor], quantized: dict[Linear, Scheme]) -> dict[str, Tensor]:
    """The dequantized weights of a gptq output by parameter name, which for linears is the name on disk."""
    form, own = formats.find("gptq"), model.state_dict()
    found = {}
    for linear, scheme in quantized.items():
        weight = form.decode(linear, scheme, stored)
        found[linear.weight] = (weight.t() if linear.transposed else weight).to(own[linear.weight].dtype)
    return found


# --- methods and options on one of them


@pytest.mark.parametrize("method", ["rtn", "gptq", "tuned"])
def test_every_method_tells_the_truth(method: str, tmp_path: Path) -> None:
    """Also about norms' gains, which `tuned` trains."""
    found = run(write(tmp_path / "model", "qwen2"), "dense", method=method, scheme=Scheme(3, 64, False))
    again = measured(load(found.model), load(found.out), found.model)
    assert reported(found.report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)


def test_a_model_of_which_parts_stay_dense(tmp_path: Path) -> None:
    rules = (LayerRule(r"layers\.1\.", None), LayerRule("o_proj", Scheme(8, -1)))
    model = write(tmp_path / "model", "llama", sharded=True)
    dense, packed = run(model, "dense", rules=rules), run(model, "compressed-tensors", rules=rules)
    assert {each["name"].split(".")[2] for each in packed.report["kept_dense"]} == {"1"}
    assert dense.report["blocks"][1]["linears"] == []
    ids = tokens()
    assert torch.equal(load(packed.out)(ids).logits, load(dense.out)(ids).logits)


def test_groups_fitted_to_every_linear(tmp_path: Path) -> None:
    """128, 64 and 36 inputs, of which no group size divides the last."""
    settings = {"hidden_size": 64, "intermediate_size": 36, "num_attention_heads": 4, "head_dim": 32}
    model = write(tmp_path / "model", "llama", settings=settings)
    dense, packed = (run(model, form, scheme=Scheme(4, AUTO)) for form in ("dense", "compressed-tensors"))
    named = {each["name"].split(".")[-1]: each["scheme"] for each in packed.report["blocks"][1]["linears"]}
    assert [named[name] for name in ("o_proj", "q_proj", "down_proj")] == ["W4A16 g128", "W4A16 g64", "W4A16 channel"]
    assert "4 bits, groups of a size fitted to each linear" in (packed.out / "report.md").read_text()
    ids = tokens()
    assert torch.equal(load(packed.out)(ids).logits, load(dense.out)(ids).logits)


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_another_precision_for_the_forward_passes(form: str, tmp_path: Path) -> None:
    """The output keeps the model's own; the report says what it was measured in."""
    found = run(write(tmp_path / "model", "llama"), form, dtype="float32")
    assert torch.float32 not in {tensor.dtype for tensor in found.tensors().values()}
    assert found.report["fidelity"]["dtype"] == "torch.float32"
    source, compressed = (load(folder, dtype=torch.float32) for folder in (found.model, found.out))
    compressed(tokens())  # compressed-tensors puts the weights into place only now
    again = measured(source, compressed, found.model)
    assert reported(found.report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)


def test_tensors_of_any_kind_that_no_module_claims_are_copied(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "llama")
    kinds = {torch.float8_e4m3fn: 1.5, torch.uint16: 7, torch.complex64: 1 + 2j, torch.bool: True}
    extra = {f"model.layers.{i % 3}.extra{i}": torch.full((2, 3), v, dtype=k) for i, (k, v) in enumerate(kinds.items())}
    save_file({**load_file(model / "model.safetensors"), **extra}, model / "model.safetensors", {"format": "pt"})
    found = run(model, "compressed-tensors").tensors()
    assert all(found[name].dtype == tensor.dtype for name, tensor in extra.items())
    assert all(torch.equal(found[n].view(torch.uint8), t.view(torch.uint8)) for n, t in extra.items())


class StopsAfterBlock(Silent):
    """A Progress of a run that is stopped when a block is done."""

    def block(self, index: int, total: int, facts: Mapping[str, float]) -> None:
        raise KeyboardInterrupt


def test_text_goes_through_a_block_that_is_left_alone(tmp_path: Path) -> None:
    """What comes later is calibrated on what that block makes of it, as in a run that takes it up finished."""
    model = write(tmp_path / "model", "llama")
    rules = (LayerRule(r"layers\.0\.", None),)
    asked = [request(model, tmp_path / name, scheme=SCHEME, rules=rules) for name in ("whole", "resumed")]
    run_quantize(asked[0], Silent())
    with pytest.raises(KeyboardInterrupt):
        run_quantize(asked[1], StopsAfterBlock())
    assert [block["resumed"] for block in run_quantize(asked[1], Silent())["blocks"]] == [True, False]
    whole, resumed = (load_file(each.out / "model.safetensors") for each in asked)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_matrices_that_share_an_input_may_be_stored_in_several_precisions(method: str, tmp_path: Path) -> None:
    """Each keeps scales of its own; a run reads its last block back, so all of them must be what was solved for."""
    model = write(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    odd = [name for name in weights if name.endswith(("q_proj.weight", "up_proj.weight"))]
    weights.update({name: weights[name].half() for name in odd})
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    stored = run(model, "compressed-tensors", method=method).tensors()
    kinds = {stored[name.removesuffix("weight") + "weight_scale"].dtype for name in odd}
    assert kinds == {torch.float16}
    assert stored["model.layers.0.self_attn.k_proj.weight_scale"].dtype == torch.bfloat16


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "gemma3_text")
    first = run(model, "compressed-tensors")
    second = replace(first.request, out=tmp_path / "again")
    run_quantize(second, Silent())
    for path in first.out.iterdir():
        if not path.name.startswith("report."):
            assert (second.out / path.name).read_bytes() == path.read_bytes()


def test_linears_that_nothing_flows_through(tmp_path: Path) -> None:
    """A decoder taken out of an encoder-decoder still has the weights that looked at the encoder."""
    config = BartConfig(
        vocab_size=4096, d_model=64, decoder_layers=2, decoder_ffn_dim=64, decoder_attention_heads=2, encoder_layers=2
    )
    model = save(BartForCausalLM(config), tmp_path / "model")
    with pytest.raises(InputError, match=r"nothing flows through model\.decoder\.layers\.0\.encoder_attn\.k_proj, "):
        run(model, "dense")
    assert run(model, "dense", rules=(LayerRule("encoder_attn", None),)).report["passed"]
