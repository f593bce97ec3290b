"""Against the compressors and decompressors of compressed-tensors itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from stored import changed, decoded, refusal, store
from torch import Tensor

from llmpare.compress.formats.decoded import open_dense

ROWS, COLUMNS, GROUP = 24, 96, 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Leaves = dict[str, Tensor]


def scale_shape(args: dict[str, Any]) -> tuple[int, ...]:
    if args["strategy"] == "block":
        height, width = args["block_structure"]
        return (-(-ROWS // height), -(-COLUMNS // width))
    return {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, COLUMNS // GROUP)}[args["strategy"]]


def weights(bits: int, strategy: str, *, symmetric: bool = True, kind: str = "int", **more: Any) -> dict[str, Any]:
    if strategy == "group":
        more["group_size"] = GROUP
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, **more}


def config(layout: str, args: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**args, "dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def compressed(layout: str, args: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Leaves:
    """What compressed-tensors makes of a random weight."""
    generator = torch.Generator().manual_seed(args["num_bits"])
    scale = (0.01 + torch.rand(scale_shape(args), generator=generator) * 0.02).to(dtype)
    leaves = {"weight": torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) * 0.1, "weight_scale": scale}
    if not args["symmetric"]:
        half = 2 ** (args["num_bits"] - 1)
        leaves["weight_zero_point"] = torch.randint(-half, half, scale.shape, generator=generator).to(torch.int8)
    return dict(BaseCompressor.get_value_from_registry(layout).compress(leaves, scheme(args)))


def scheme(args: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def reference(layout: str, args: dict[str, Any], leaves: Leaves, dtype: torch.dtype) -> Tensor:
    """What it makes of that after the scales were cast to the model's precision, as transformers does."""
    cast = {**leaves, "weight_scale": leaves["weight_scale"].to(dtype)}
    weight = BaseCompressor.get_value_from_registry(layout).decompress(cast, scheme(args))["weight"]
    assert isinstance(weight, Tensor)
    return weight


PACKED = [
    ("pack-quantized", weights(bits, strategy, symmetric=symmetric))
    for bits in (2, 3, 4, 8)
    for strategy in ("group", "channel", "tensor")
    for symmetric in (True, False)
]
BYTES = [
    *(
        ("int-quantized", weights(8, strategy, symmetric=s))
        for strategy in ("tensor", "channel")
        for s in (True, False)
    ),
    ("naive-quantized", weights(4, "group", symmetric=False)),
    *(("float-quantized", weights(8, strategy, kind="float")) for strategy in ("tensor", "channel")),
    ("float-quantized", weights(8, "block", kind="float", block_structure=[16, 64])),
    ("naive-quantized", weights(8, "group", kind="float")),
]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "args"), PACKED + BYTES)
def test_decoded_as_by_the_library(layout: str, args: dict[str, Any], stored: torch.dtype, tmp_path: Path) -> None:
    leaves = compressed(layout, args, stored)
    folder = store(tmp_path, leaves, config(layout, args))
    for dtype in DTYPES:
        expected = reference(layout, args, leaves, dtype)
        assert expected.shape == (ROWS, COLUMNS)
        assert torch.equal(decoded(folder, dtype), expected)
    assert torch.equal(decoded(folder), decoded(folder, torch.float32))


@pytest.mark.parametrize(
    ("layout", "args", "expected"),
    [
        ("pack-quantized", weights(4, "group"), "compressed-tensors W4A16 g32"),
        ("pack-quantized", weights(3, "channel", symmetric=False), "compressed-tensors W3A16_ASYM channel"),
        ("int-quantized", weights(8, "tensor"), "compressed-tensors W8A16 tensor"),
        (
            "float-quantized",
            weights(8, "block", kind="float", block_structure=[16, 64]),
            "compressed-tensors FP8 16x64",
        ),
    ],
)
def test_what_it_is_called(layout: str, args: dict[str, Any], expected: str, tmp_path: Path) -> None:
    leaves = compressed(layout, args)
    folder = store(tmp_path, leaves, config(layout, args), dtype="float16")
    with open_dense(folder) as source:
        assert source.scheme == expected
        assert source.linear_bits == 8 * sum(t.nbytes for t in leaves.values()) / (ROWS * COLUMNS)
        assert source.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F16"
        assert source.parameters == ROWS * COLUMNS + 4


def test_codes_that_are_not_split_between_words(tmp_path: Path) -> None:
    """Ten values of three bits in a word, as versions before 0.18 wrote them."""
    args = weights(3, "group", symmetric=False)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (ROWS, COLUMNS), generator=generator)
    zero = torch.randint(8, (ROWS, COLUMNS // GROUP), generator=generator)
    scale = torch.rand(ROWS, COLUMNS // GROUP, generator=generator).half()

    def pack(values: Tensor) -> Tensor:
        words = torch.zeros(len(values), -(-values.shape[1] // 10), dtype=torch.int64)
        for i in range(values.shape[1]):
            words[:, i // 10] |= values[:, i] << (3 * (i % 10))
        return words.to(torch.int32)

    leaves = {
        "weight_packed": pack(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
        "weight_zero_point": pack(zero.t()).t(),
    }
    expected = (codes - zero.repeat_interleave(GROUP, 1)) * scale.float().repeat_interleave(GROUP, 1)
    assert torch.equal(decoded(store(tmp_path, leaves, config("pack-quantized", args))), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_out_of_order(symmetric: bool, tmp_path: Path) -> None:
    """act-order with groups of its own: every column has the scale its index names."""
    args = weights(4, "group", symmetric=symmetric)
    leaves = compressed("pack-quantized", args, torch.float32)
    in_order = decoded(store(tmp_path / "a", leaves, config("pack-quantized", args)))
    plain = torch.arange(COLUMNS, dtype=torch.int32) // GROUP
    shuffled = plain[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
    for index, expected in ((plain, plain), (torch.full_like(plain, -1), plain), (shuffled, shuffled)):
        folder = store(tmp_path / "b", {**leaves, "weight_g_idx": index}, config("pack-quantized", args))
        found = decoded(folder)
        # The codes are those of the weight in order; taken back to integers, they meet the scales they are given.
        scale = leaves["weight_scale"]
        zero = torch.zeros_like(scale) if symmetric else unpacked_zero(leaves)
        codes = in_order / scale[:, plain] + zero[:, plain]
        assert torch.allclose(found, (codes.round() - zero[:, expected]) * scale[:, expected], atol=1e-6)
    assert not torch.equal(found, in_order)


def unpacked_zero(leaves: Leaves) -> Tensor:
    """Signed zero points of 4 bits [rows, groups], as float32."""
    words = leaves["weight_zero_point"]
    fields = [(words >> (4 * i)) & 15 for i in range(8)]
    return torch.stack(fields, 1).flatten(0, 1)[:ROWS].float() - 8


def test_a_last_group_that_is_shorter(tmp_path: Path) -> None:
    args = {**weights(8, "group"), "group_size": 40}
    codes = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS).remainder(255).sub(127).to(torch.int8)
    scale = torch.rand(ROWS, 3)
    folder = store(tmp_path, {"weight": codes, "weight_scale": scale}, config("int-quantized", args))
    assert torch.equal(decoded(folder), codes * scale.repeat_interleave(40, 1)[:, :COLUMNS])


def test_the_scheme_whose_target_is_the_linear(tmp_path: Path) -> None:
    """Of two that the sizes agree with, and of two that they tell apart."""
    four, grouped = weights(4, "channel", symmetric=False), weights(4, "channel")
    leaves = compressed("pack-quantized", four)
    made = config("pack-quantized", four)
    wrong, right = ({"targets": [t], "weights": w} for t, w in (("Linear", grouped), (r"re:.*mlp\.up_proj$", four)))
    for order in ((wrong, right), (right, wrong)):
        made["config_groups"] = {f"group_{i}": group for i, group in enumerate(order)}
        folder = store(tmp_path, leaves, made)
        assert torch.equal(decoded(folder, torch.bfloat16), reference("pack-quantized", four, leaves, torch.bfloat16))
        with open_dense(folder) as source:
            assert source.scheme == "compressed-tensors W4A16_ASYM channel"
    made["config_groups"] = {
        "group_0": {"targets": ["re:renamed"], "weights": four},
        "group_1": {"targets": ["Linear"], "weights": weights(8, "channel")},
    }
    store(tmp_path, leaves, made)
    assert torch.equal(decoded(tmp_path, torch.bfloat16), reference("pack-quantized", four, leaves, torch.bfloat16))


# --- what is refused

ARGS = weights(4, "group", symmetric=False)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"weight_scale": None}, "up_proj.weight_scale is missing; beside it there is weight_packed, weight_shape"),
        ({"weight_shape": None}, "up_proj.weight_shape is missing"),
        ({"weight_zero_point": None}, "up_proj.weight_zero_point is missing"),
        ({"weight_scale": torch.ones(ROWS, 2)}, "up_proj.weight_scale has shape [24, 2], expected [24, 3]"),
        ({"weight_scale": torch.ones(ROWS, 3, dtype=torch.int32)}, "up_proj.weight_scale is I32, expected F32 or"),
        ({"weight_scale": torch.full((ROWS, 3), torch.nan)}, "up_proj.weight_scale holds NaN or infinite scales"),
        ({"weight_scale": torch.full((ROWS, 3), torch.inf)}, "up_proj.weight_scale holds NaN or infinite scales"),
        ({"weight_shape": torch.tensor([ROWS + 1, COLUMNS])}, "up_proj.weight_shape holds [25, 96], but 24 rows"),
        ({"weight_shape": torch.tensor([ROWS, -1])}, "up_proj.weight_shape holds [24, -1]"),
        ({"weight_shape": torch.tensor([ROWS, 2**62])}, "has 12 words for 4611686018427387904 columns of 4 bits"),
        ({"weight_shape": torch.tensor([ROWS])}, "up_proj.weight_shape has shape [1], expected [2]"),
        ({"weight_packed": torch.zeros(ROWS, 13, dtype=torch.int32)}, "weight_packed has 13 words for 96 columns of 4"),
        (
            {"weight_packed": torch.zeros(2, ROWS, 12, dtype=torch.int32)},
            "weight_packed has shape [2, 24, 12], expected",
        ),
        ({"weight_packed": torch.zeros(ROWS, 12)}, "up_proj.weight_packed is F32, expected I32"),
        ({"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "zero_point has shape [3, 2], expected [3, 3]"),
        ({"weight_g_idx": torch.zeros(95, dtype=torch.int32)}, "up_proj.weight_g_idx has shape [95], expected [96]"),
        (
            {"weight_g_idx": torch.full((96,), 3, dtype=torch.int32)},
            "weight_g_idx names groups 3 to 3, there are 0 to 2",
        ),
        ({"weight": torch.ones(ROWS, COLUMNS)}, "up_proj.weight is there twice, packed and dense"),
    ],
)
def test_broken_tensors(new: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    leaves = changed(compressed("pack-quantized", ARGS), **new)
    message = refusal(store(tmp_path, leaves, config("pack-quantized", ARGS)))
    assert said in message
    assert message.startswith("model.layers.0.mlp.up_proj.")


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ({"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.int8)}, "up_proj.weight_scale is missing"),
        ({"weight": torch.ones(ROWS, COLUMNS), "weight_scale": torch.ones(1)}, "it was saved before it was compressed"),
        (
            {"weight": torch.ones(ROWS, COLUMNS).to(torch.float8_e4m3fn), "weight_scale": torch.ones(ROWS, 1)},
            "up_proj.weight is F8_E4M3, and no scheme in config.json is",
        ),
        ({"bitmask": torch.zeros(ROWS, 12, dtype=torch.uint8)}, "is stored as a sparse bitmask"),
        (
            {"weight": torch.ones(ROWS, COLUMNS)},
            "says the model is quantized with compressed-tensors, but no weight is",
        ),
    ],
)
def test_other_ways_of_being_stored(leaves: Leaves, said: str, tmp_path: Path) -> None:
    assert said in refusal(store(tmp_path, leaves, config("int-quantized", weights(8, "channel"))))


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantizes the KV cache while it runs (kv_cache_scheme)"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "is stored sparse (sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transforms activations while it runs"),
        ({"format": "nvfp4-pack-quantized"}, "is stored as compressed-tensors 'nvfp4-pack-quantized'"),
        ({"format": "marlin-24"}, "is stored as compressed-tensors 'marlin-24'"),
        ({"config_groups": {}}, "quantization_config: config_groups is not what compressed-tensors writes"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": None}}}, "quantization_config: g is not what"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": ARGS, "input_activations": ACTIVATIONS}}},
            "quantizes activations while it runs (input_activations of g)",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": ARGS, "output_activations": ACTIVATIONS}}},
            "quantizes activations while it runs (output_activations of g)",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": ARGS, "format": "mxfp4-pack-quantized"}}},
            "is stored as compressed-tensors 'mxfp4-pack-quantized'",
        ),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**ARGS, "num_bits": "4"}}}}, "g is not what"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**ARGS, "group_size": 0}}}}, "g is not what"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": ARGS}}}, "g is not what"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": ARGS}}}, "'re:(' is no regular expression"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {**ARGS, "num_bits": 4, "type": "float"}}}},
            "has weights of float 4 in g",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {**ARGS, "strategy": "tensor_group"}}}},
            "has scales by 'tensor_group' in g",
        ),
    ],
)
def test_what_weights_alone_do_not_show(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    leaves = compressed("pack-quantized", ARGS)
    assert said in refusal(store(tmp_path, leaves, config("pack-quantized", ARGS, **more)))
    empty = {"kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}}
    decoded(store(tmp_path, leaves, config("pack-quantized", ARGS, **empty)))
