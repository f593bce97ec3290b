"""What holds whatever the weights are stored as."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import load, measured, reported, request, tokens, write
from safetensors.torch import load_file, save_file
from stored import NAME, WEIGHT, refusal, store

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.model import whole
from llmpare.compress.model.layout import layout
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.progress import Silent
from llmpare.compress.request import LayerRule, Scheme
from llmpare.compress.run import run_quantize

INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    },
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with linears of two schemes, and some that are dense."""
    folder = tmp_path_factory.mktemp("decoded")
    model = write(folder / "model", "llama")
    rules = (LayerRule("o_proj", None), LayerRule("down_proj", Scheme(8, 64, False)))
    run_quantize(request(model, folder / "w4", scheme=Scheme(4, 32), rules=rules, method="rtn"), Silent())
    return folder / "w4"


def test_a_dense_checkpoint_is_itself(tmp_path: Path) -> None:
    model = write(tmp_path, "mistral")
    with open_dense(model) as source, Checkpoint.open(model) as checkpoint:
        assert (source.folder, source.config, source.tensors) == (model, checkpoint.config, checkpoint.tensors)
        assert (source.scheme, source.linear_bits) == ("dense", None)
        expected = load(model).state_dict()
        assert source.parameters == sum(tensor.numel() for tensor in expected.values())
        assert source.weight_bytes == 4 * source.parameters
        for name in source.tensors:
            assert torch.equal(source.tensor(name), expected[name])
            assert source.tensor(name, torch.float16).dtype == torch.float32  # as it is stored


def test_a_packed_checkpoint_seen_as_dense(packed: Path) -> None:
    with open_dense(packed) as source, Checkpoint.open(packed.with_name("model")) as original:
        assert source.scheme == "compressed-tensors W4A16 g32, W8A16_ASYM g64"
        assert {n: (t.dtype, t.shape) for n, t in source.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in original.tensors.items()
        }
        assert source.config == original.config
        assert layout(source).linears == layout(original).linears
        stored = load_file(packed / "model.safetensors")
        assert source.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
        leaves = [t for name, t in stored.items() if ".weight_" in name]
        weights = [info.numel for name, info in source.tensors.items() if "_proj" in name and "o_proj" not in name]
        assert source.linear_bits == pytest.approx(8 * sum(t.nbytes for t in leaves) / sum(weights))
        assert all(tensor.nbytes == tensor.numel * 2 for tensor in source.tensors.values())


def test_one_tensor_is_read_at_a_time(packed: Path) -> None:
    with open_dense(packed) as source:
        before = set(source.checkpoint.digests)
        assert all(name.endswith(".weight_shape") for name in before)
        source.tensor("model.layers.1.mlp.up_proj.weight")
        parts = {f"model.layers.1.mlp.up_proj.weight_{leaf}" for leaf in ("packed", "scale", "shape")}
        assert set(source.checkpoint.digests) == before | parts


def test_block_by_block_it_is_the_model_that_transformers_loads(packed: Path) -> None:
    ids = tokens()
    with open_dense(packed) as source:
        found = layout(source)
        made = Skeleton(source, found, torch.bfloat16, torch.device("cpu"), trust=False)
        made.place_outside({name: source.tensor(name, torch.bfloat16) for name in found.outside})
        for names in found.blocks:
            made.place({name: source.tensor(name, torch.bfloat16) for name in names})
        loaded = whole.load(source, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(made.model(ids).logits, loaded(ids).logits)


def test_what_quantize_reported_is_what_is_measured(packed: Path) -> None:
    report = json.loads((packed / "report.json").read_text())
    model = packed.with_name("model")
    with open_dense(packed) as source:
        loaded = whole.load(source, torch.bfloat16, torch.device("cpu"))
    assert reported(report["fidelity"]) == pytest.approx(measured(load(model), loaded, model), rel=1e-5, abs=1e-6)


def test_what_changes_while_it_is_read(tmp_path: Path) -> None:
    folder = store(tmp_path, {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scale": torch.ones(8, 1)}, INT8)
    with open_dense(folder) as source:
        source.tensor(WEIGHT)
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(source.checkpoint.tensors[WEIGHT].start)
            file.write(b"\1")
        with pytest.raises(InputError, match=f"tensor '{WEIGHT}' changed while it was in use"):
            source.tensor(WEIGHT)


@pytest.mark.parametrize("leaf", ["weight_packed", "qweight", "weight_scale_inv"])
def test_packed_tensors_that_the_config_does_not_explain(leaf: str, tmp_path: Path) -> None:
    message = refusal(store(tmp_path, {leaf: torch.zeros(4, 4)}, None))
    assert f"{NAME}.{leaf} belongs to a quantized weight, but config.json has no quantization_config" in message


@pytest.mark.parametrize("method", ["bitsandbytes", "fbgemm_fp8", "torchao", None, 4])
def test_other_methods_are_refused_by_name(method: Any, tmp_path: Path) -> None:
    message = refusal(store(tmp_path, {"weight": torch.ones(4, 4)}, {"quant_method": method}))
    assert f"quantized with the method {method!r}" in message
    assert "what can be read: dense weights, compressed-tensors, gptq, awq, fp8, mxfp4" in message


def test_the_older_name_of_the_config(tmp_path: Path) -> None:
    leaves = {"weight": torch.ones(8, 8, dtype=torch.int8), "weight_scale": torch.full((8, 1), 0.5)}
    with open_dense(store(tmp_path, leaves, None, compression_config=INT8)) as source:
        assert torch.equal(source.tensor(WEIGHT), torch.full((8, 8), 0.5))
        assert "compression_config" not in source.config


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder"), open_dense(tmp_path / "none"):
        pass


def test_parts_in_different_files(tmp_path: Path) -> None:
    leaves = {"weight": torch.ones(8, 8, dtype=torch.int8), "weight_scale": torch.full((8, 1), 0.5)}
    folder = store(tmp_path, leaves, INT8)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for number, (name, tensor) in enumerate(stored.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors", {"format": "pt"})
        index[name] = f"model-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with open_dense(folder) as source:
        assert torch.equal(source.tensor(WEIGHT), torch.full((8, 8), 0.5))
