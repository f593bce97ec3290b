"""Every family, in 4 bits by GPTQ from one file and in 8 bits by rounding from several: what loads, and that it is all.

docs/families.md is written from the same list.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import MATRIX, Family, load, measured, reported, request, tokens, write
from families_page import page
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.model import whole
from llmpare.compress.progress import Silent
from llmpare.compress.report import html
from llmpare.compress.request import NO_TEXT, LayerRule, Scheme, TextSpec
from llmpare.compress.run import run_quantize

ROOT = Path(__file__).parents[2]
CONV1D = ("gpt2",)  # compressed-tensors has no such module


@pytest.fixture(autouse=True)
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes longer than the run; tests/compress/report look at it."""
    monkeypatch.setattr(html, "render", lambda report: "")


@pytest.mark.parametrize("sharded", [False, True], ids=["W4A16", "W8A16, sharded"])
@pytest.mark.parametrize("name", MATRIX)
def test_every_family(name: str, sharded: bool, tmp_path: Path) -> None:
    family = MATRIX[name]
    model = write(tmp_path / "model", name, sharded=sharded)
    assert (len(list(model.glob("*.safetensors"))) > 1) == sharded
    how = {"method": "rtn", "scheme": Scheme(8, -1), "calibration": TextSpec(NO_TEXT)} if sharded else {}
    form = "dense" if name in CONV1D else "compressed-tensors"
    asked = request(model, tmp_path / "out", **{"format": form, "scheme": Scheme(4, 32), **how})
    report = run_quantize(asked, Silent())

    original, loaded, ids = load(model), load(asked.out), tokens()
    quantized = [linear["name"] for block in report["blocks"] for linear in block["linears"]]
    assert sorted(quantized) == linears(original, family)
    with open_dense(asked.out) as source, torch.no_grad():
        decoded = whole.load(source, family.dtype, torch.device("cpu"))
    after = loaded(ids).logits
    assert torch.equal(after, decoded(ids).logits)
    assert not torch.equal(after, original(ids).logits)
    if not sharded:  # the model that was measured in memory is the one that was loaded
        again = measured(original, loaded, model)
        assert reported(report["fidelity"]) == pytest.approx(again, rel=1e-4, abs=1e-5)


def linears(model: nn.Module, family: Family) -> list[str]:
    """All there are in the blocks, by the names of their modules."""
    blocks = model.get_submodule(family.blocks)
    found = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return sorted(f"{family.blocks}.{name}" for name in found)


def test_the_page_lists_what_is_tested() -> None:
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("mixed", [False, True])
def test_code_that_looks_at_weights_while_they_are_loaded(mixed: bool, tmp_path: Path) -> None:
    """Transformers then has to unpack them first, which it does right for a single scheme only."""
    asked = request(write(tmp_path / "model", "falcon"), tmp_path / "out", method="rtn", calibration=TextSpec(NO_TEXT))
    if mixed:
        asked = replace(asked, rules=(LayerRule("dense", Scheme(8, 32)),))
    report = run_quantize(asked, Silent())
    quantization = json.loads((asked.out / "config.json").read_text())["quantization_config"]
    assert ("dequantize" in quantization) == (not mixed)
    (warning,) = report["warnings"]
    assert warning.startswith("the model's own code looks at weights while it is loaded")
    assert ("transformers cannot load it with more than one scheme" in warning) == mixed


def test_further_prediction_heads_are_kept_byte_for_byte(tmp_path: Path) -> None:
    """Numbered as blocks beyond those of the config; servers that build them must not expect packed weights there."""
    model = write(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    extra = {
        name.replace("layers.1.", "layers.2."): value.clone() for name, value in weights.items() if "layers.1." in name
    }
    extra["model.layers.2.eh_proj.weight"] = torch.randn(128, 256).bfloat16()
    save_file({**weights, **extra}, model / "model.safetensors", {"format": "pt"})
    asked = request(model, tmp_path / "out", method="rtn", scheme=Scheme(4, 32), calibration=TextSpec(NO_TEXT))
    run_quantize(asked, Silent())
    stored = load_file(asked.out / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in extra.items())
    ignored = json.loads((asked.out / "config.json").read_text())["quantization_config"]["ignore"]
    matrices = {name.removesuffix(".weight") for name, value in extra.items() if value.ndim == 2}
    assert set(ignored) == {"lm_head", *matrices}
    assert load(asked.out)(tokens()).logits.isfinite().all()
