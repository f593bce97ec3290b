import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, save, write
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Layout, find, layout

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
SEEING: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "vision_config": {},
    "text_config": {"num_hidden_layers": 2},
}
UP, NORM = "mlp.up_proj.weight", "input_layernorm.weight"


def checkpoint(folder: Path, tensors: Mapping[str, tuple[int, ...]], config: Any = LLAMA, dtype: str = "BF16") -> Path:
    """Writes a checkpoint with these tensors, all zero."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    CheckpointWriter(folder, [TensorSpec(name, dtype, shape) for name, shape in tensors.items()]).close()
    return folder


def blocks(*numbers: int, prefix: str = "model.layers.") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{i}.{name}": shape for i in numbers for name, shape in ((UP, (64, 32)), (NORM, (32,)))}


def of(model: Path) -> Layout:
    with Checkpoint.open(model) as opened:
        return layout(opened)


def refusal(model: Path) -> str:
    with pytest.raises(InputError) as caught:
        of(model)
    return f"{caught.value} | {caught.value.hint}"


PREFIXES = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}
LLAMA_LINEARS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{n}_proj" for n in "koqv")]
LINEARS = {
    "phi3": ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"],
    "opt": ["fc1", "fc2", *(f"self_attn.{n}_proj" for n in ("k", "out", "q", "v"))],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "attention.query_key_value", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
    "gptj": [*(f"attn.{n}_proj" for n in ("k", "out", "q", "v")), "mlp.fc_in", "mlp.fc_out"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_read_off_names_and_shapes(family: str, tmp_path: Path) -> None:
    found = of(write(tmp_path, family))
    prefix = PREFIXES.get(family, "model.layers")
    assert found.prefix == prefix
    assert len(found.blocks) == 2
    for index in (0, 1):
        names = sorted(linear.name for linear in found.of_block(index))
        assert names == [f"{prefix}.{index}.{name}" for name in LINEARS.get(family, LLAMA_LINEARS)]
        assert {linear.weight for linear in found.of_block(index)} < set(found.blocks[index])
        assert all(name.startswith(f"{prefix}.{index}.") for name in found.blocks[index])
    with Checkpoint.open(tmp_path) as opened:
        inside = {name for block in found.blocks for name in block}
        assert inside | set(found.outside) == set(opened.tensors)
        assert not inside & set(found.outside)
        for linear in found.linears:
            shape = opened.tensors[linear.weight].shape
            assert (linear.rows, linear.columns) == (shape[::-1] if family == "gpt2" else shape)
            assert linear.dtype == opened.tensors[linear.weight].dtype
            assert linear.transposed == (family == "gpt2")


def test_a_linear_of_conv1d_has_the_rows_that_it_puts_out(tmp_path: Path) -> None:
    found = {linear.name: linear for linear in of(write(tmp_path, "gpt2")).linears}
    attention = found["transformer.h.0.attn.c_attn"]
    assert (attention.rows, attention.columns) == (3 * 128, 128)


def test_blocks_are_the_numbers_that_hold_most(tmp_path: Path) -> None:
    extra = {"model.norms.0.weight": (32,), "model.norms.1.weight": (32,), "model.norms.2.weight": (32,)}
    found = of(checkpoint(tmp_path, {**extra, **blocks(0, 1)}))
    assert found.prefix == "model.layers"
    assert found.outside == tuple(extra)


def test_ten_blocks_are_in_order(tmp_path: Path) -> None:
    found = of(checkpoint(tmp_path, blocks(*reversed(range(11))), {**LLAMA, "num_hidden_layers": 11}))
    assert [block[0] for block in found.blocks] == [f"model.layers.{i}.{UP}" for i in range(11)]


def test_no_prefix_at_all(tmp_path: Path) -> None:
    found = of(checkpoint(tmp_path, blocks(0, 1, prefix="")))
    assert [linear.name for linear in found.linears] == ["0.mlp.up_proj", "1.mlp.up_proj"]


def test_blocks_beyond_those_of_the_config_are_carried_along(tmp_path: Path) -> None:
    """Heads that predict several tokens are stored as further blocks."""
    found = of(checkpoint(tmp_path, blocks(0, 1, 2)))
    assert len(found.blocks) == 2
    assert found.outside == (f"model.layers.2.{UP}", f"model.layers.2.{NORM}")


@pytest.mark.parametrize("tower", ["visual.blocks", "model.vision_tower.encoder.layers", "model.vision_model.layers"])
def test_blocks_of_a_vision_tower_are_not_those_of_the_decoder(tower: str, tmp_path: Path) -> None:
    """Be there as many of them, or be they larger."""
    large = {name: (4 * shape[0], *shape[1:]) for name, shape in blocks(0, 1, 2, prefix=f"{tower}.").items()}
    found = of(checkpoint(tmp_path, {**large, **blocks(0, 1, 2)}, SEEING))
    assert found.prefix == "model.layers"
    assert len(found.blocks) == 2
    assert set(large) < set(found.outside)


def test_a_missing_block(tmp_path: Path) -> None:
    message = refusal(checkpoint(tmp_path, blocks(0, 2)))
    assert "config.json promises 2 blocks, the weights hold 2 under 'model.layers'" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"architectures": ["BertModel"]}, "architecture BertModel is not supported: only causal language models"),
        (
            {"architectures": ["BlipForConditionalGeneration"], "vision_config": {}},
            "BlipForConditionalGeneration is not supported: it has a vision_config, but no text_config beside it",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "text_config": {}}, "it has a text_config, but no vision_config"),
        (
            {"architectures": ["QwenForCausalLM"], "audio_config": {}},
            "it has an audio_config: models of more",
        ),
        ({**SEEING, "audio_config": {}}, "Gemma4ForConditionalGeneration is not supported: it has an audio_config"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "method 'awq') | start from the original model"),
        ({**LLAMA, "quantization_config": [1]}, "method 'unknown'"),
        ({**LLAMA, "hidden_size_per_layer_input": 8}, "arguments that depend on the tokens (hidden_size_per_layer_"),
        ({**LLAMA, "num_hidden_layers": 0, "n_layer": 2}, "promises 0 blocks"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(checkpoint(tmp_path, blocks(0, 1), config))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.embed_tokens.weight": (64, 32)}, "its tensors are not numbered by block"),
        (
            {f"model.layers.{i}.{NORM}": (32,) for i in (0, 1)},
            "no two-dimensional weight was found under 'model.layers'",
        ),
        (
            {**blocks(0, 1), "model.layers.0.mlp.experts.3.w1.weight": (64, 32)},
            "model.layers.0.mlp.experts.3.w1.weight [64, 32] is part of a mixture of experts",
        ),
        (
            {**blocks(0, 1), "model.layers.1.mlp.experts.up": (4, 64, 32)},
            "mlp.experts.up [4, 64, 32] is part of a mixture of experts, and config.json has none",
        ),
        (
            {**blocks(0, 1), "model.layers.1.input_linear.weight": (4, 64, 32)},
            "model.layers.1.input_linear.weight [4, 64, 32] is part of",
        ),
    ],
)
def test_structures_that_are_refused(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    message = refusal(checkpoint(tmp_path, tensors))
    assert message.startswith("architecture LlamaForCausalLM is not supported: ")
    assert said in message
    assert "supported: Llama, Mistral, Qwen2" in message


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    assert f"model.layers.0.{UP} is I8; weights must be F32, F16, BF16" in refusal(
        checkpoint(tmp_path, blocks(0, 1), dtype="I8")
    )


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    save(T5ForConditionalGeneration(config), tmp_path)
    assert "T5ForConditionalGeneration is not supported: it is an encoder-decoder" in refusal(tmp_path)


def test_convolutions_are_no_linears(tmp_path: Path) -> None:
    save(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)), tmp_path)
    found = of(tmp_path)
    assert {linear.name.rpartition(".")[2] for linear in found.linears} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert "backbone.layers.0.mixer.conv1d.weight" in found.blocks[0]


@pytest.mark.parametrize(
    ("config", "expected"), [({"a": 1, "b": 2}, 1), ({"a": None, "b": 2}, 2), ({"b": 0}, 0), ({}, 7)]
)
def test_the_first_spelling_that_is_there(config: dict[str, Any], expected: int) -> None:
    assert find(config, "a", "b", default=7) == expected
