"""Pins what transformers' loader does with tensors that are decoded on the way in."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from families import FAMILIES, VOCABULARY, load, random_model, save, tokens, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmpare.compress.errors import InputError
from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.model import whole

CPU = torch.device("cpu")
MOE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Whose experts are many tensors on disk and one in memory; those of Mixtral have other names, too.
EXPERTS = {
    "qwen3_moe": {**MOE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**MOE, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def read(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    with open_dense(folder) as source:
        return whole.load(source, dtype, CPU)


def alike(made: nn.Module, reference: nn.Module) -> None:
    state, expected = made.state_dict(), reference.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert torch.equal(made(tokens()).logits, reference(tokens()).logits)


def experts(folder: Path, family: str) -> Path:
    config = transformers.AutoConfig.for_model(family, **EXPERTS[family])
    return save(random_model(config), folder)


def pack(folder: Path, out: Path) -> Path:
    """Every linear but the head and the routers in 4 bits, by compressed-tensors, with the names there are on disk.

    Beside it, in `out`-dense, the same weights as compressed-tensors decodes them.
    """
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or module.endswith(("gate", "head", "embed_tokens")):
            packed[name] = dense[name] = weight
            continue
        scale = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
        leaves = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        packed |= {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()}
        dense[name] = compressor.decompress(leaves, scheme)["weight"]
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    for place, weights, more in ((out, packed, {"quantization_config": quantization}), (plain(out), dense, {})):
        place.mkdir()
        (place / "config.json").write_text(json.dumps({**config, **more}))
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    return out


def plain(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-dense")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_that_transformers_loads(family: str, tmp_path: Path) -> None:
    write(tmp_path, family)
    made = read(tmp_path, FAMILIES[family].dtype)
    assert not made.training
    alike(made, load(tmp_path))


@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts(family: str, tmp_path: Path) -> None:
    packed = pack(experts(tmp_path / "model", family), tmp_path / "w4")
    with open_dense(packed) as source:
        assert sum("expert" in name for name in source.packed) == 2 * 4 * 3
    alike(read(packed), load(plain(packed), dtype=torch.float32))


def test_a_packed_model_in_another_precision(tmp_path: Path) -> None:
    """Scales are rounded to the model's precision first, as compressed-tensors in transformers does."""
    packed = pack(write(tmp_path / "model", "llama", dtype=torch.float32), tmp_path / "w4")
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16).eval()
    made = read(packed, torch.bfloat16)
    assert torch.equal(made(tokens()).logits, model(tokens()).logits)
    assert not torch.equal(made(tokens()).logits, read(plain(packed), torch.bfloat16)(tokens()).logits)


def test_settings_of_generation_come_along(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": [1, 2]}))
    made = read(tmp_path)
    assert made.generation_config.eos_token_id == [1, 2]
    assert made.generate(tokens(1, 4), do_sample=False).shape[1] <= 4 + 7


def test_code_that_comes_with_the_model(tmp_path: Path) -> None:
    """Runs where it is trusted, and not where it is not."""
    model = write(tmp_path, "llama")
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    with open_dense(model) as source:
        made = whole.load(source, torch.bfloat16, CPU, trust=True)
        with pytest.raises(InputError, match="transformers cannot load"):
            whole.load(source, torch.bfloat16, CPU)
    assert type(made).__name__ == "OwnForCausalLM"
    (model / "config.json").write_text(json.dumps(config))
    assert torch.equal(made(tokens()).logits, load(model)(tokens()).logits)


def test_a_missing_tensor(tmp_path: Path) -> None:
    """Which transformers would fill with random numbers."""
    weights = load_file(write(tmp_path, "llama") / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"the checkpoint lacks model\.norm\.weight"):
        read(tmp_path)


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    config = json.loads((write(tmp_path, "llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(InputError, match=r"down_proj.weight has shape \[128, 256\], config.json implies \[128, 512\]"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    with pytest.raises(InputError, match="transformers cannot load"):
        read(tmp_path)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_scales_that_are_no_numbers(family: str, tmp_path: Path) -> None:
    """The error of a worker thread of the loader arrives as what it is, also from within a conversion."""
    model = write(tmp_path / "model", "llama") if family == "llama" else experts(tmp_path / "model", family)
    packed = pack(model, tmp_path / "w4")
    weights = load_file(packed / "model.safetensors")
    last = [name for name in weights if name.endswith(".weight_scale")][-5]
    weights[last][0, 0] = torch.nan
    save_file(weights, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{last} holds NaN"):
        read(packed)


def test_no_progress_bar_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "llama")
    capfd.readouterr()
    read(tmp_path)
    assert capfd.readouterr().err == ""
    assert transformers.logging.is_progress_bar_enabled()
