"""Against the book, and against what transformers makes of the same file on a device without FP8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import tokens, write
from safetensors.torch import load_file, save_file
from stored import NAME, changed, decoded, refusal, store
from torch import Tensor

from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.model import whole

ROWS, COLUMNS, BLOCK = 40, 72, [16, 32]


def config(block: list[int] | None = BLOCK, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, **more}


def linear(rows: int = ROWS, columns: int = COLUMNS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    grid = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    return {
        "weight": torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(grid, generator=generator) * 0.1,
    }


def test_decoded_by_the_book(tmp_path: Path) -> None:
    """Blocks at the edges are cut off."""
    leaves = linear()
    folder = store(tmp_path, leaves, config(), dtype="bfloat16")
    scale = leaves["weight_scale_inv"].repeat_interleave(16, 0).repeat_interleave(32, 1)[:ROWS, :COLUMNS]
    expected = leaves["weight"].float() * scale
    assert torch.equal(decoded(folder), expected)
    assert torch.equal(decoded(folder, torch.bfloat16), expected.bfloat16())
    with open_dense(folder) as source:
        assert source.scheme == "fp8 16x32, weights only"
        assert source.tensors[f"{NAME}.weight"].dtype == "BF16"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all(shape: tuple[int, ...], tmp_path: Path) -> None:
    leaves = changed(linear(), weight_scale_inv=torch.full(shape, 0.5))
    folder = store(tmp_path, leaves, config(None))
    assert torch.equal(decoded(folder), leaves["weight"].float() * 0.5)
    with open_dense(folder) as source:
        assert source.scheme == "fp8 tensor, weights only"


def test_as_transformers_decodes_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama")
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            scale = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 16)).abs().amax((1, 3)) / 448
            spread = scale.repeat_interleave(16, 0).repeat_interleave(32, 1)
            weights |= {name: (weight / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config()}))
    with open_dense(folder) as source:
        made = whole.load(source, torch.bfloat16, torch.device("cpu"))
    decoding = transformers.FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=decoding
    )
    assert torch.equal(made(tokens()).logits, reference(tokens()).logits)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"weight_scale_inv": None}, "up_proj.weight_scale_inv is missing; beside it there is weight"),
        ({"weight_scale_inv": torch.ones(3, 2)}, "up_proj.weight_scale_inv has shape [3, 2], expected [3, 3]"),
        ({"weight_scale_inv": torch.full((3, 3), torch.nan)}, "up_proj.weight_scale_inv holds NaN or infinite scales"),
        ({"weight": torch.ones(ROWS, COLUMNS, dtype=torch.int8)}, "up_proj.weight is I8, expected F8_E4M3"),
    ],
)
def test_broken_tensors(new: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    assert said in refusal(store(tmp_path, changed(linear(), **new), config()))


@pytest.mark.parametrize("block", [[128], [0, 128], ["128", 128], []])
def test_blocks_that_are_none(block: list[Any], tmp_path: Path) -> None:
    assert "weight_block_size is" in refusal(store(tmp_path, linear(), config(block)))
