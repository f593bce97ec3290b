import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmpare.compress.checkpoint.manifest import build_manifest, signed
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.inspect import inspect, lines

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def checkpoint(folder: Path, tensors: Shapes, quantization: Mapping[str, Any] | None = None) -> Path:
    """A folder with these tensors, all zero but weight_shape, which says 256 × 768."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    with CheckpointWriter(folder, specs) as writer:
        for spec in specs:
            stored = bytes(spec.nbytes)
            if spec.name.endswith("weight_shape"):
                stored = b"".join(size.to_bytes(8, "little") for size in (256, 768))
            writer.write(spec.name, stored)
    return folder


NORM: Shapes = {"norm.weight": ("BF16", (768,)), "a.down.bias": ("BF16", (256,))}


def packed(bits: int, groups: int, zero_point: bool = False) -> Shapes:
    """A linear of 256 × 768 as compressed-tensors stores it."""
    tensors = {
        "a.down.weight_packed": ("I32", (256, 768 * bits // 32)),
        "a.down.weight_scale": ("BF16", (256, groups)),
        "a.down.weight_shape": ("I64", (2,)),
    }
    if zero_point:
        tensors["a.down.weight_zero_point"] = ("I32", (256 * bits // 32, groups))
    return {**tensors, **NORM}


def gptq(bits: int, groups: int) -> Shapes:
    return {
        "a.down.qweight": ("I32", (768 * bits // 32, 256)),
        "a.down.qzeros": ("I32", (groups, 256 * bits // 32)),
        "a.down.scales": ("F16", (groups, 256)),
        "a.down.g_idx": ("I32", (768,)),
        **NORM,
    }


AWQ: Shapes = {
    "a.down.qweight": ("I32", (768, 32)),
    "a.down.qzeros": ("I32", (6, 32)),
    "a.down.scales": ("F16", (6, 256)),
    **NORM,
}
NVFP4: Shapes = {
    "a.down.weight_packed": ("U8", (256, 384)),
    "a.down.weight_scale": ("F8_E4M3", (256, 48)),
    "a.down.weight_global_scale": ("F32", (1,)),
    **NORM,
}
FP8: Shapes = {"a.down.weight": ("F8_E4M3", (256, 768)), "a.down.weight_scale": ("F32", (256, 1)), **NORM}

COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WEIGHTS = 256 * 768


@pytest.mark.parametrize(
    ("tensors", "quantization", "scheme", "extra_bits"),
    [
        (packed(4, 6), COMPRESSED, "W4A16 g128", 16 / 128 + 128 / WEIGHTS),
        (packed(3, 12), COMPRESSED, "W3A16 g64", 16 / 64 + 128 / WEIGHTS),
        (packed(2, 1), COMPRESSED, "W2A16 channel", 16 / 768 + 128 / WEIGHTS),
        (packed(8, 6, zero_point=True), COMPRESSED, "W8A16_ASYM g128", 24 / 128 + 128 / WEIGHTS),
        (gptq(4, 6), {"quant_method": "gptq", "sym": True}, "W4A16 g128", 20 / 128 + 32 / 256),
        (gptq(3, 24), {"quant_method": "gptq", "sym": False}, "W3A16_ASYM g32", 19 / 32 + 32 / 256),
        (AWQ, {"quant_method": "awq", "zero_point": True}, "W4A16_ASYM g128", 20 / 128),
        (NVFP4, COMPRESSED, "FP4 g16", 8 / 16 + 32 / WEIGHTS),
        (FP8, COMPRESSED, "F8_E4M3", 32 / 768),
    ],
)
def test_schemes_are_read_off_the_tensors(
    tmp_path: Path, tensors: Shapes, quantization: dict[str, Any], scheme: str, extra_bits: float
) -> None:
    facts = inspect(checkpoint(tmp_path, tensors, quantization))
    assert facts["schemes"] == {scheme: 1}
    assert facts["parameters"] == {"total": WEIGHTS + 768 + 256, "quantized": WEIGHTS}
    bits = 8 if scheme == "F8_E4M3" else int(scheme[2] if scheme.startswith("FP") else scheme[1])
    assert facts["linear_bits_per_weight"] == pytest.approx(bits + extra_bits)
    assert facts["bytes"]["total"] == sum(facts["bytes"]["by_dtype"].values())
    assert any(scheme in line for line in lines(facts))


def test_every_expert_in_mxfp4_counts(tmp_path: Path) -> None:
    stack: Shapes = {
        "a.down_blocks": ("U8", (4, 64, 24, 16)),
        "a.down_scales": ("U8", (4, 64, 24)),
        "a.down_bias": ("BF16", (4, 64)),
        "norm.weight": ("BF16", (768,)),
    }
    facts = inspect(checkpoint(tmp_path, stack, {"quant_method": "mxfp4"}))
    assert facts["schemes"] == {"MXFP4 g32": 4}
    assert facts["parameters"] == {"total": WEIGHTS + 768 + 256, "quantized": WEIGHTS}
    assert facts["linear_bits_per_weight"] == 4.25


def test_a_dense_model() -> None:
    facts = inspect(TINY_LLAMA)
    assert facts["format"] == "dense"
    assert facts["schemes"] == {}
    assert facts["linear_bits_per_weight"] is None
    assert facts["parameters"] == {"total": 5_770_496, "quantized": 0}
    assert facts["bytes"] == {"total": 11_540_992, "by_dtype": {"BF16": 11_540_992}}
    assert (facts["tensors"], facts["shards"], facts["manifest"]) == (56, 1, None)
    assert any("not written by llmpare" in line for line in lines(facts))


def test_the_older_name_of_the_config(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, packed(4, 6))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "compression_config": COMPRESSED}))
    assert inspect(folder)["format"] == "compressed-tensors pack-quantized"


def test_mixed_schemes_are_counted_each(tmp_path: Path) -> None:
    second = {name.replace("a.down", "b.down"): spec for name, spec in packed(8, 6).items() if "down" in name}
    third = {name.replace("a.down", "c.down"): spec for name, spec in packed(8, 6).items() if "down" in name}
    facts = inspect(checkpoint(tmp_path, {**packed(4, 6), **second, **third}, COMPRESSED))
    assert facts["schemes"] == {"W8A16 g128": 2, "W4A16 g128": 1}
    assert facts["format"] == "compressed-tensors pack-quantized"


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight_packed": ("I32", (0, 0)), "a.weight_scale": ("BF16", (0, 0)), "a.weight_shape": ("I64", (2,))},
        {"a.weight_packed": ("I32", (4,)), "a.weight_scale": ("BF16", (4,)), "a.weight_shape": ("I64", (2,))},
        {"a.weight_packed": ("I32", (4, 1)), "a.weight_scale": ("BF16", (4, 1)), "a.weight_shape": ("I64", (0,))},
        {"a.weight_packed": ("I32", (4, 1)), "a.weight_scale": ("BF16", (4, 1))},
        {"a.qweight": ("I32", (4, 4)), "a.scales": ("F16", (1, 4)), "a.g_idx": ("I32", (0,))},
        {"a.qweight": ("I32", (4, 4))},
        {"a.weight": ("F8_E4M3", (4, 4))},
        {"a.down_blocks": ("U8", (4, 4, 4, 16))},
        {"a.down_blocks": ("U8", (4, 4, 4, 16)), "a.down_scales": ("U8", (4, 4))},
        {"a.down_blocks": ("U8", (0, 4, 4, 16)), "a.down_scales": ("U8", (0, 4, 4))},
        {"a.down_blocks": ("U8", (4,)), "a.down_scales": ("U8", (4,))},
        {"": ("BF16", (1,)), ".": ("BF16", (1,)), "bias": ("BF16", ())},
    ],
)
def test_what_only_looks_quantized_is_not_taken_for_it(tmp_path: Path, tensors: Shapes) -> None:
    """Shapes come from files that anyone can write; none of them may end in a bug of ours."""
    specs = {name: (dtype, shape) for name, (dtype, shape) in tensors.items() if not name.endswith("weight_shape")}
    rest = {name: spec for name, spec in tensors.items() if name not in specs}
    zero = {name.replace("weight_shape", "weight_shape_"): spec for name, spec in rest.items()}
    facts = inspect(checkpoint(tmp_path, {**specs, **zero}, {}))
    assert facts["schemes"] == {}
    assert facts["linear_bits_per_weight"] is None
    assert lines(facts)


@pytest.mark.parametrize("columns", [0, -1, 2**40])
def test_a_weight_shape_that_cannot_be_is_not_believed(tmp_path: Path, columns: int) -> None:
    folder = checkpoint(tmp_path, packed(4, 6), COMPRESSED)
    with CheckpointWriter(folder, [TensorSpec(n, d, s) for n, (d, s) in packed(4, 6).items()]) as writer:
        writer.write("a.down.weight_shape", b"".join(n.to_bytes(8, "little", signed=True) for n in (256, columns)))
    assert inspect(folder)["schemes"] == {}


def test_the_manifest_is_compared_by_size(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, packed(4, 6), COMPRESSED)
    manifest = build_manifest(folder, spec={}, source={}, versions={}, tensors={})
    (folder / "manifest.json").write_bytes(signed(manifest))
    facts = inspect(folder)
    assert facts["manifest"] == {"files": 2, "wrong": []}
    assert any("'llmpare verify'" in line for line in lines(facts))
    (folder / "config.json").write_text('{"architectures": ["Other"]}', encoding="utf-8")
    facts = inspect(folder)
    assert facts["manifest"]["wrong"] == ["config.json"]
    assert any("config.json" in line for line in lines(facts))


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, NORM)
    (folder / "manifest.json").write_text('{"llmpare_manifest": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="manifest"):
        inspect(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none"):
        inspect(tmp_path / "none")
