"""Models that are published in FP8 or MXFP4: decoded when they are read, and compressed as the dense model is."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import load, request, tokens, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmpare.cli.exits import main
from llmpare.compress.errors import InputError
from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.formats.source import open_source
from llmpare.compress.plan import plan_quantize
from llmpare.compress.progress import Silent
from llmpare.compress.report import html
from llmpare.compress.request import NO_TEXT, Scheme, TextSpec
from llmpare.compress.run import run_quantize

BLOCK = (32, 64)
FP8 = torch.float8_e4m3fn
Parts = dict[str, Tensor]


@pytest.fixture(autouse=True)
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes longer than the run; tests/compress/report look at it."""
    monkeypatch.setattr(html, "render", lambda report: "")


def by_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight in FP8, and its scales [rows / 32, columns / 64]."""
    scale = weight.float().unflatten(1, (-1, BLOCK[1])).unflatten(0, (-1, BLOCK[0])).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return (weight / spread).to(FP8), scale


def deepseek(name: str, weight: Tensor) -> Parts:
    codes, scale = by_block(weight)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}


def block(name: str, weight: Tensor) -> Parts:
    codes, scale = by_block(weight)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale.bfloat16()}


def channel(name: str, weight: Tensor) -> Parts:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return {f"{name}.weight": (weight / scale).to(FP8), f"{name}.weight_scale": scale}


def tensor(name: str, weight: Tensor) -> Parts:
    scale = (weight.float().abs().amax() / 448).bfloat16().reshape(1)
    codes = (weight / scale).to(FP8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.ones(1)}


def compressed_tensors(weights: Mapping[str, Any], activations: Mapping[str, Any]) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, **activations},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


STORED: dict[str, tuple[Callable[[str, Tensor], Parts], dict[str, Any], str]] = {
    "DeepSeek": (
        deepseek,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
        "fp8 32x64, weights only",
    ),
    "FP8_BLOCK": (
        block,
        compressed_tensors(
            {"strategy": "block", "block_structure": list(BLOCK)},
            {"strategy": "group", "group_size": 64, "dynamic": True},
        ),
        "compressed-tensors FP8 32x64",
    ),
    "FP8_DYNAMIC": (
        channel,
        compressed_tensors({"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        "compressed-tensors FP8 channel",
    ),
    "FP8": (
        tensor,
        compressed_tensors({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        "compressed-tensors FP8 tensor",
    ),
}


@pytest.fixture(params=STORED)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str]:
    """A model in low precision, the same model dense, and what the former is called."""
    pack, quantization, scheme = STORED[request.param]
    folder = write(tmp_path / "low", "qwen2", tied=False)
    tensors: Parts = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors |= pack(name.removesuffix(".weight"), weight) if name.endswith("_proj.weight") else {name: weight}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    dense = tmp_path / "dense"
    shutil.copytree(folder, dense)
    with open_source(write_config(folder, {**settings, "quantization_config": quantization})) as source:
        data = {name: source.read(name) for name in source.tensors}
        assert {info.dtype for info in source.tensors.values()} == {"BF16"}
        decoded = {
            name: torch.frombuffer(data[name], dtype=torch.bfloat16).view(info.shape)
            for name, info in source.tensors.items()
        }
    save_file(decoded, dense / "model.safetensors", {"format": "pt"})
    return folder, dense, scheme


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def test_compressed_as_the_dense_model_is(stored: tuple[Path, Path, str], tmp_path: Path) -> None:
    """To the last bit; only the report and what it was made from differ."""
    low, dense, scheme = stored
    reports = []
    for model, out in ((low, tmp_path / "a"), (dense, tmp_path / "b")):
        asked = request(
            model, out, method="rtn", scheme=Scheme(4, 32), calibration=TextSpec(NO_TEXT), format="compressed-tensors"
        )
        reports.append(run_quantize(asked, Silent()))
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config, other = (json.loads((tmp_path / out / "config.json").read_text()) for out in "ab")
    assert config == other
    assert [report["source"]["scheme"] for report in reports] == [scheme, "dense"]
    assert reports[0]["source"]["bytes"] < reports[1]["source"]["bytes"]
    assert reports[0]["fidelity"] == reports[1]["fidelity"]
    assert scheme in (tmp_path / "a" / "report.md").read_text()
    ids = tokens()
    assert torch.equal(load(tmp_path / "a")(ids).logits, load(tmp_path / "b")(ids).logits)


def test_pruned_and_planned(stored: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, dense, scheme = stored
    assert main(["plan", str(low)]) == 0
    assert f"source   {scheme}: decoded" in capsys.readouterr().out
    out = tmp_path / "half"
    text = ["--eval-dataset", str(low / ".text" / "evaluation.txt"), "--eval-nsamples", "2", "--seqlen", "32"]
    command = ["prune", str(low), "-o", str(out), "--sparsity", "0.5", "--method", "magnitude", "--dataset", "none"]
    assert main([*command, *text, "--no-refit", "--device", "cpu", "--quiet"]) == 0
    assert main([*command, *text, "--no-refit", "--device", "cpu", "--quiet"]) == 0  # verified, not made again
    before, after = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        changed = name.endswith("_proj.weight")
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, torch.where(weight == 0, 0, before[name])) if changed else True
        assert changed or torch.equal(weight, before[name])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert load(out)(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_all_else_that_is_quantized_is_refused(quantization: dict[str, Any], tmp_path: Path) -> None:
    model = write(tmp_path / "model", "llama")
    settings = json.loads((model / "config.json").read_text())
    write_config(model, {**settings, "quantization_config": quantization})
    with pytest.raises(InputError, match=f"already quantized .*, method '{quantization['quant_method']}'"):
        plan_quantize(request(model, tmp_path / "out"))


def test_another_weight_is_noticed(tmp_path: Path) -> None:
    """A digest is that of the bytes on disk, of all that a decoded tensor is made of."""
    digests = []
    for change in (1.0, 2.0):
        folder = write(tmp_path / str(change), "llama", sharded=False)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj"
        tensors |= deepseek(name, tensors[f"{name}.weight"])
        tensors[f"{name}.weight_scale_inv"] *= change
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
        write_config(folder, {**settings, "quantization_config": quantization})
        with open_source(folder) as source, open_dense(folder) as dense:
            source.read(f"{name}.weight")
            assert source.weight_bytes == dense.weight_bytes
            digests.append(source.digest(f"{name}.weight"))
    assert digests[0] != digests[1]


LARGE = 8192
READ = """
import sys
from pathlib import Path
from llmpare.compress import memory
from llmpare.compress.checkpoint import tensors
from llmpare.compress.formats.source import open_source
with open_source(Path(sys.argv[1])) as source:
    before = memory.resident()
    data = source.read(sys.argv[2])
    print(len(data), source.decoding, memory.peak_resident() - before)
"""


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_decoding_takes_the_memory_that_is_counted(method: str, tmp_path: Path) -> None:
    """However large the tensor is: what it is made of, the tensor, and a fixed amount."""
    if method == "fp8":
        tensors = deepseek("large", torch.ones(LARGE, LARGE, dtype=torch.bfloat16))
        quantization, name = {"quant_method": method, "weight_block_size": list(BLOCK)}, "large.weight"
    else:
        blocks = torch.full((4, LARGE // 4, LARGE // 32, 16), 0x22, dtype=torch.uint8)
        tensors = {"large_blocks": blocks, "large_scales": torch.full(blocks.shape[:3], 127, dtype=torch.uint8)}
        quantization, name = {"quant_method": method}, ".large"
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    write_config(tmp_path, {"dtype": "bfloat16", "quantization_config": quantization})
    done = subprocess.run([sys.executable, "-c", READ, tmp_path, name], capture_output=True, text=True, check=True)
    size, beside, taken = map(int, done.stdout.split())
    assert size == 2 * LARGE**2
    assert beside < size
    assert 0.9 * size < taken < size + beside + 4 * 2**20  # pages of the interpreter's own
