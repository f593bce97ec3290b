import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from families import load, request, save, solved, tokens, write
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

from llmpare.compress import formats
from llmpare.compress.checkpoint.tensors import DTYPES, NAMES
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Linear
from llmpare.compress.progress import Silent
from llmpare.compress.request import BITS, GROUP_SIZES, NO_TEXT, PER_CHANNEL, LayerRule, Scheme, TextSpec
from llmpare.compress.run import run_quantize

FORM = formats.find("compressed-tensors")
SCHEMES = [Scheme(b, g, s) for b in BITS for g in (*GROUP_SIZES, PER_CHANNEL) for s in (True, False)]
NAME = "model.layers.0.mlp.up_proj"


def config(schemes: dict[Linear, Scheme | None], base: Scheme, outside: Sequence[str] = ("lm_head",)) -> Any:
    made = FORM.config(schemes, base, outside)
    assert made is not None
    QuantizationConfig.model_validate(made)
    return made


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_what_is_stored_is_what_was_solved(scheme: Scheme, dtype: str) -> None:
    """To the last bit: by our own reading, and by that of the library other loaders are built on."""
    linear = Linear(NAME, 0, 40, 256, dtype)  # rows that fill no whole number of words
    expected = solved(linear, scheme, FORM)
    tensors = FORM.encode(linear, scheme, expected)
    assert {(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()} == {
        (spec.name, spec.dtype, spec.shape) for spec in FORM.specs(linear, scheme)
    }
    assert (f"{NAME}.weight_zero_point" in tensors) != scheme.symmetric
    assert torch.equal(FORM.decode(linear, scheme, tensors), expected.weight())
    again = FORM.solved(linear, scheme, tensors)
    assert torch.equal(again.codes, expected.codes)
    assert torch.equal(again.scale, expected.scale)
    assert torch.equal(again.zero, expected.zero)
    assert torch.equal(FORM.weight(linear, expected), expected.weight())

    (group,) = QuantizationConfig.model_validate(config({linear: scheme}, scheme)).config_groups.values()
    local = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(local, group)["weight"]
    assert torch.equal(theirs, expected.weight().to(DTYPES[dtype]))


def test_one_scheme_is_every_linear_but_those_outside_the_blocks() -> None:
    schemes: dict[Linear, Scheme | None] = {Linear(NAME, 0, 64, 128, "BF16"): Scheme(3, 64)}
    assert config(schemes, Scheme(3, 64), ["model.project_in", "lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["model.project_in", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 3,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                },
            }
        },
    }


def test_no_group_size_for_a_scale_per_channel() -> None:
    made = config({Linear(NAME, 0, 64, 128, "BF16"): Scheme(8, PER_CHANNEL, False)}, Scheme())
    assert made["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel", "dynamic": False},
    }


def test_several_schemes_go_by_name() -> None:
    """All of them: loaders that join q, k and v look for 'Linear' before they look for the names of the parts."""
    linears = [Linear(f"model.layers.{i}.mlp.{n}_proj", i, 64, 128, "BF16") for i in (0, 1, 12) for n in ("up", "down")]
    schemes = {n: Scheme(8) if n.block == 12 else None if "down" in n.name else Scheme(4) for n in linears}
    made = config(schemes, Scheme(4))
    assert made["ignore"] == ["lm_head", r"re:(.*\.)?layers\.(0|1)\.mlp\.down_proj$"]
    assert {
        name: (group["weights"]["num_bits"], group["targets"]) for name, group in made["config_groups"].items()
    } == {
        "group_0": (4, [r"re:(.*\.)?layers\.(0|1)\.mlp\.up_proj$"]),
        "group_1": (
            8,
            [r"re:(.*\.)?layers\.(12)\.mlp\.up_proj$", r"re:(.*\.)?layers\.(12)\.mlp\.down_proj$"],
        ),
    }


def test_conv1d_is_refused_unless_it_stays_dense() -> None:
    linear = Linear("h.0.attn.c_attn", 0, 96, 32, "F32", transposed=True)
    with pytest.raises(InputError, match=r"h\.0\.attn\.c_attn: it is a Conv1D") as caught:
        FORM.check({linear: Scheme()})
    assert "--format gptq or --format dense" in caught.value.hint
    FORM.check({linear: None})


def test_zero_points_are_noted() -> None:
    linear = Linear(NAME, 0, 64, 128, "BF16")
    assert FORM.notes({linear: Scheme()}) == ()
    (note,) = FORM.notes({linear: Scheme(symmetric=False)})
    assert "dequantize=True" in note


# --- whole checkpoints, in plain transformers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "llama", "llama", settings={"num_hidden_layers": 1})


@pytest.mark.parametrize(
    "scheme",
    [*(Scheme(b, 32, s) for b in BITS for s in (True, False)), Scheme(4, 64), Scheme(4, 128), Scheme(4, PER_CHANNEL)],
    ids=lambda scheme: scheme.name,
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_loads_every_scheme(scheme: Scheme, llama: Path, tmp_path: Path) -> None:
    """Exactly: the logits are those of a dense model that holds the dequantized weights."""
    for form in ("compressed-tensors", "dense"):
        asked = request(llama, tmp_path / form, format=form, scheme=scheme, method="rtn", calibration=TextSpec(NO_TEXT))
        run_quantize(asked, Silent())
    # what the plan's note says: transformers reads zero points in no other way
    options = {} if scheme.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    packed, dense = load(tmp_path / "compressed-tensors", **options), load(tmp_path / "dense")
    ids = tokens()
    assert torch.equal(packed(ids).logits, dense(ids).logits)
    assert not torch.equal(dense(ids).logits, load(llama)(ids).logits)


MIXED = (
    LayerRule(r"0\.self_attn\.[qkv]_proj", Scheme(8, 64)),
    LayerRule(r"down_proj", None),
    LayerRule(r"o_proj", Scheme(4, PER_CHANNEL)),
)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_transformers_loads_mixed_schemes(prefix: str, tmp_path: Path) -> None:
    """Also of a checkpoint saved from the bare decoder, whose names lack the prefix that its modules have."""
    model = write(tmp_path / "model", "qwen2")
    if not prefix:
        save(load(model).base_model, tmp_path / "bare")
        config = json.loads((model / "config.json").read_text())
        (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
        model = tmp_path / "bare"
    for form in ("compressed-tensors", "dense"):
        run_quantize(request(model, tmp_path / form, format=form, rules=MIXED), Silent())
    stored = load_file(tmp_path / "compressed-tensors" / "model.safetensors")
    assert f"{prefix}layers.0.mlp.down_proj.weight" in stored
    assert stored[f"{prefix}layers.0.self_attn.q_proj.weight_packed"].shape == (128, 128 * 8 // 32)
    assert stored[f"{prefix}layers.1.self_attn.q_proj.weight_packed"].shape == (128, 128 * 4 // 32)
    assert stored[f"{prefix}layers.0.self_attn.o_proj.weight_scale"].shape == (128, 1)
    packed, dense = load(tmp_path / "compressed-tensors"), load(tmp_path / "dense")
    ids = tokens()
    assert torch.equal(packed(ids).logits, dense(ids).logits)


def test_projections_around_the_embeddings_stay_dense(tmp_path: Path) -> None:
    """OPT-350m has linears outside its blocks; a loader must not look for their codes."""
    model = write(tmp_path / "model", "opt", settings={"word_embed_proj_dim": 64, "do_layer_norm_before": False})
    for form in ("compressed-tensors", "dense"):
        run_quantize(request(model, tmp_path / form, format=form), Silent())
    written = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == ["model.decoder.project_out", "model.decoder.project_in", "lm_head"]
    packed, dense = load(tmp_path / "compressed-tensors"), load(tmp_path / "dense")
    ids = tokens()
    assert torch.equal(packed(ids).logits, dense(ids).logits)
