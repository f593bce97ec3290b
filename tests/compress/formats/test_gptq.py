import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import load, measured, reported, request, solved, write
from safetensors.torch import load_file
from torch import Tensor

from llmpare.compress import formats
from llmpare.compress.checkpoint.tensors import NAMES
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Linear
from llmpare.compress.progress import Silent
from llmpare.compress.request import BITS, GROUP_SIZES, PER_CHANNEL, LayerRule, Scheme
from llmpare.compress.run import run_quantize

FORM = formats.find("gptq")
SCHEMES = [Scheme(b, g, s) for b in BITS for g in (*GROUP_SIZES, PER_CHANNEL) for s in (True, False)]
NAME = "model.layers.0.mlp.up_proj"


def fields(words: Tensor, bits: int) -> Tensor:
    """The b-bit numbers in int32 words [rows, words], as float64: the first one in the lowest bits of the first."""
    little = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    stream = np.unpackbits(little, axis=1, bitorder="little").reshape(len(little), -1, bits)
    return torch.from_numpy((stream * 2.0 ** np.arange(bits)).sum(-1))


def dequantized(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Tensor:
    """The weight [rows, columns] in float32 by the book: scales[g_idx]·(q − zero point)."""
    codes = fields(tensors[f"{name}.qweight"].t(), config["bits"])
    zero = fields(tensors[f"{name}.qzeros"], config["bits"]) + {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    group = tensors[f"{name}.g_idx"].long()
    return ((codes - zero[group].t()) * tensors[f"{name}.scales"][group].t().double()).float()


def config(schemes: Mapping[Linear, Scheme | None], base: Scheme) -> dict[str, Any]:
    made = FORM.config(schemes, base, ["lm_head"])
    assert made is not None
    return made


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_what_is_stored_is_what_was_solved(scheme: Scheme) -> None:
    linear = Linear(NAME, 0, 96, 256, "BF16")
    expected = solved(linear, scheme, FORM)
    tensors = FORM.encode(linear, scheme, expected)
    assert {(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()} == {
        (spec.name, spec.dtype, spec.shape) for spec in FORM.specs(linear, scheme)
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(dequantized(tensors, NAME, config({linear: scheme}, scheme)), expected.weight())
    assert torch.equal(FORM.decode(linear, scheme, tensors), expected.weight())
    again = FORM.solved(linear, scheme, tensors)
    assert torch.equal(again.codes, expected.codes)
    assert torch.equal(again.scale, expected.scale)
    assert torch.equal(again.zero, expected.zero)
    assert torch.equal(FORM.weight(linear, expected), expected.weight())


def test_symmetric_zero_points_are_stored_less_one() -> None:
    linear = Linear(NAME, 0, 32, 64, "F16")
    tensors = FORM.encode(linear, Scheme(4, 32), solved(linear, Scheme(4, 32), FORM))
    assert (tensors[f"{NAME}.qzeros"] == 0x77777777).all()
    assert tensors[f"{NAME}.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_config() -> None:
    linear = Linear(NAME, 0, 64, 128, "BF16")
    assert config({linear: Scheme(3, 64)}, Scheme(3, 64)) == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "static_groups": False,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["llmpare:0.1.0"]},
    }
    made = config({linear: Scheme(8, PER_CHANNEL, False)}, Scheme())
    assert (made["bits"], made["group_size"], made["sym"], made["checkpoint_format"]) == (8, -1, False, "gptq_v2")


def test_what_stays_dense_is_said_twice() -> None:
    """For loaders that list what is quantized, and for those that list what is not."""
    up, down = (Linear(f"model.layers.0.mlp.{name}_proj", 0, 64, 128, "BF16") for name in ("up", "down"))
    made = config({up: Scheme(), down: None}, Scheme())
    assert made["modules_in_block_to_quantize"] == [[up.name]]
    assert made["dynamic"] == {r"-:.*model\.layers\.0\.mlp\.down_proj$": {}}


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40)])
def test_what_fills_no_whole_words_is_refused(rows: int, columns: int) -> None:
    linear = Linear(NAME, 0, rows, columns, "BF16")
    with pytest.raises(InputError, match=rf"32 values at a time.*up_proj \[{rows}, {columns}\]") as caught:
        FORM.check({linear: Scheme(4, PER_CHANNEL)})
    assert "--ignore" in caught.value.hint
    FORM.check({linear: None})


def test_two_schemes_are_refused() -> None:
    up, down = (Linear(f"model.layers.0.mlp.{name}_proj", 0, 64, 128, "BF16") for name in ("up", "down"))
    with pytest.raises(InputError, match="one scheme per model, this run asks for W4A16 g128, W8A16 g128") as caught:
        FORM.check({up: Scheme(4), down: Scheme(8)})
    assert "compressed-tensors" in caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "noted"), [(Scheme(4), False), (Scheme(8), False), (Scheme(3), True), (Scheme(4, symmetric=False), True)]
)
def test_what_servers_do_not_load_is_noted(scheme: Scheme, noted: bool) -> None:
    notes = FORM.notes({Linear(NAME, 0, 64, 128, "BF16"): scheme})
    assert [scheme.name in note for note in notes] == [True] * noted


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"rope_theta": 5e5, "dtype": "float16", "torch_dtype": "float16"}, {}),
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}),
    ],
)
def test_older_names_of_settings(source: dict[str, Any], expected: dict[str, Any]) -> None:
    assert FORM.aliases(source) == expected


# --- whole checkpoints


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(3, 128), Scheme(2, 64, False)], ids=lambda scheme: scheme.name
)
def test_a_checkpoint_holds_what_the_dense_one_does(scheme: Scheme, family: str, tmp_path: Path) -> None:
    """Half-precision models, whose scales are the same in every format."""
    model = write(tmp_path / "model", family, dtype=torch.float16, tied=family == "gpt2")
    for form in ("gptq", "dense"):
        run_quantize(request(model, tmp_path / form, format=form, scheme=scheme), Silent())
    written = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert written["quantization_config"] == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    packed, dense = (load_file(tmp_path / form / "model.safetensors") for form in ("gptq", "dense"))
    linears = [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]
    assert len(linears) == {"llama": 14, "gpt2": 8}[family]
    for name in linears:
        weight = dequantized(packed, name, written["quantization_config"]).half()
        assert torch.equal(weight, dense[f"{name}.weight"].t() if family == "gpt2" else dense[f"{name}.weight"])
    others = {name for name in dense if name.rpartition(".")[0] not in linears or name.endswith(".bias")}
    assert others == {
        name for name in packed if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")
    }
    for name in others:
        assert torch.equal(packed[name], dense[name])


def test_what_was_measured_is_what_is_stored(tmp_path: Path) -> None:
    """Also when scales are stored more coarsely than the model's own precision would allow, as for float32."""
    folder = write(tmp_path / "model", "mistral")
    asked = request(folder, tmp_path / "gptq", format="gptq", scheme=Scheme(4, 64), rules=(LayerRule("o_proj", None),))
    report = run_quantize(asked, Silent())
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    written = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    (names,) = written["modules_in_block_to_quantize"]
    assert len(names) == 12
    assert not any("o_proj" in name for name in names)
    source, filled = load(folder), load(folder)
    weights = {f"{name}.weight": dequantized(stored, name, written) for name in names}
    filled.load_state_dict({**filled.state_dict(), **weights})
    assert reported(report["fidelity"]) == pytest.approx(measured(source, filled, folder), rel=1e-5, abs=1e-6)
