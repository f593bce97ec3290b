"""Against transformers' own way of decoding gpt-oss."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmpare.compress.errors import InputError
from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.formats.source import open_source

NAME = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS, ROWS, GROUPS = 3, 10, 4


def parts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks": torch.randint(256, (EXPERTS, ROWS, GROUPS, 16), generator=generator, dtype=torch.uint8),
        "scales": torch.randint(100, 140, (EXPERTS, ROWS, GROUPS), generator=generator, dtype=torch.uint8),
    }


def store(folder: Path, tensors: dict[str, Tensor]) -> Path:
    config = {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    named = {f"{NAME}_{part}": tensor for part, tensor in tensors.items()}
    save_file({**named, f"{NAME}_bias": torch.ones(EXPERTS, ROWS)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_decoded_as_transformers_does(tmp_path: Path) -> None:
    tensors = parts()
    expected = convert_moe_packed_tensors(tensors["blocks"].clone(), tensors["scales"].clone())
    with open_dense(store(tmp_path, tensors)) as source:
        info = source.tensors[NAME]
        assert (info.dtype, info.shape) == ("BF16", (EXPERTS, 32 * GROUPS, ROWS))
        assert set(source.tensors) == {NAME, f"{NAME}_bias"}
        assert torch.equal(source.tensor(NAME, torch.bfloat16), expected)
        assert torch.equal(source.tensor(NAME), expected.float())
        assert source.linear_bits == 4.25
    with open_source(tmp_path) as opened:
        assert bytes(opened.read(NAME)) == bytes(expected.view(torch.uint8).numpy().data)
        assert opened.scheme == "mxfp4 experts"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scales": None}, "gate_up_proj_scales is missing"),
        ({"scales": torch.ones(EXPERTS, ROWS, GROUPS)}, "gate_up_proj_scales is F32, expected U8"),
        ({"scales": torch.ones(EXPERTS, ROWS, 1, dtype=torch.uint8)}, "scales has shape [3, 10, 1]"),
        ({"blocks": torch.ones(EXPERTS, ROWS, GROUPS, 8, dtype=torch.uint8)}, "blocks has shape [3, 10, 4, 8]"),
        ({"blocks": torch.ones(EXPERTS, ROWS, dtype=torch.uint8)}, "expected four dimensions"),
    ],
)
def test_what_is_amiss_is_named(change: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in {**parts(), **change}.items() if tensor is not None}
    with pytest.raises(InputError) as caught, open_dense(store(tmp_path, tensors)):
        pass
    assert said in str(caught.value)
