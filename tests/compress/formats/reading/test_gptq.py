"""Against a packer of its own, by the book, and against what our own writer makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import load, request, solved, tokens, write
from stored import NAME, changed, decoded, refusal, store
from torch import Tensor

from llmpare.compress import formats
from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.model import whole
from llmpare.compress.model.layout import Linear
from llmpare.compress.progress import Silent
from llmpare.compress.request import PER_CHANNEL, Scheme
from llmpare.compress.run import run_quantize

ROWS, COLUMNS, GROUP = 32, 96, 32
BITS = (2, 3, 4, 8)


def words(values: Tensor, bits: int) -> Tensor:
    """[n, values] → int32 [n, values · bits / 32]: a stream of bits, the lowest first."""
    stream = (values.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def linear(
    bits: int = 4, *, less: int = 1, index: Tensor | None = None, scales: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random linear, and its weight in float64. less: what stored zero points lack."""
    generator = torch.Generator().manual_seed(bits)
    index = torch.arange(COLUMNS) // GROUP if index is None else index
    codes = torch.randint(2**bits, (ROWS, COLUMNS), generator=generator)
    zero = torch.randint(1, 2**bits, (COLUMNS // GROUP, ROWS), generator=generator)
    scale = torch.randn(zero.shape, generator=generator).to(scales)
    leaves = {
        "qweight": words(codes, bits).t(),
        "qzeros": words(zero - less, bits),
        "scales": scale,
        "g_idx": index.to(torch.int32),
    }
    return leaves, (codes - zero[index].t()) * scale[index].t().double()


def config(bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True, **more}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("stored", "less"), [({"checkpoint_format": "gptq"}, 1), ({}, 1), ({"checkpoint_format": "gptq_v2"}, 0)]
)
@pytest.mark.parametrize("bits", BITS)
def test_decoded_by_the_book(bits: int, stored: dict[str, str], less: int, ordered: bool, tmp_path: Path) -> None:
    index = None if ordered else (torch.arange(COLUMNS) // GROUP)[torch.randperm(COLUMNS)]
    leaves, expected = linear(bits, less=less, index=index)
    folder = store(tmp_path, leaves, config(bits, desc_act=not ordered, **stored))
    assert torch.equal(decoded(folder).double(), expected)
    assert torch.equal(decoded(folder, torch.bfloat16), expected.bfloat16())
    assert torch.equal(decoded(folder, torch.float16), expected.half())


def test_without_an_index_groups_are_in_order(tmp_path: Path) -> None:
    leaves, expected = linear()
    folder = store(tmp_path, changed(leaves, g_idx=None), config())
    assert torch.equal(decoded(folder).double(), expected)


def test_the_dtype_is_that_of_the_model(tmp_path: Path) -> None:
    leaves, _ = linear()
    for given, expected in (({}, "F16"), ({"dtype": "bfloat16"}, "BF16"), ({"torch_dtype": "float32"}, "F32")):
        with open_dense(store(tmp_path, leaves, config(), **given)) as source:
            assert source.tensors[f"{NAME}.weight"].dtype == expected
            assert source.scheme == "gptq v1 W4A16 g32"
            assert "quantization_config" not in source.config


def test_single_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    leaves, expected = linear(8)
    dynamic = {r"+:.*up_proj": {"bits": 8}}
    assert torch.equal(decoded(store(tmp_path, leaves, config(4, dynamic=dynamic))).double(), expected)
    assert "is not 96 columns of 4 bits" in refusal(store(tmp_path, leaves, config(4)))


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, PER_CHANNEL), Scheme(2, 64, False)], ids=lambda s: s.name)
def test_what_our_writer_stores(scheme: Scheme, tmp_path: Path) -> None:
    form, described = formats.find("gptq"), Linear(NAME, 0, 96, 256, "BF16")
    expected = solved(described, scheme, form)
    leaves = {name.rpartition(".")[2]: t for name, t in form.encode(described, scheme, expected).items()}
    folder = store(tmp_path, leaves, form.config({described: scheme}, scheme, ["lm_head"]))
    assert torch.equal(decoded(folder), expected.weight())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_checkpoint(family: str, tmp_path: Path) -> None:
    """Conv1D among them: packed weights do not tell which way round the model keeps them."""
    model = write(tmp_path / "model", family, dtype=torch.float16, tied=family == "gpt2")
    for form in ("gptq", "dense"):
        run_quantize(request(model, tmp_path / form, format=form, scheme=Scheme(4, 32), method="rtn"), Silent())
    with open_dense(tmp_path / "gptq") as packed, open_dense(tmp_path / "dense") as dense:
        assert set(packed.tensors) == set(dense.tensors)
        for name, info in dense.tensors.items():
            assert (packed.tensors[name].dtype, packed.tensors[name].shape) == (info.dtype, info.shape)
            assert torch.equal(packed.tensor(name, torch.float16), dense.tensor(name))
        loaded = whole.load(packed, torch.float16, torch.device("cpu"))
    ids = tokens()
    assert torch.equal(loaded(ids).logits, load(tmp_path / "dense")(ids).logits)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"scales": None}, "up_proj.scales is missing; beside it there is g_idx, qweight, qzeros"),
        ({"qzeros": None}, "up_proj.qzeros is missing"),
        ({"qzeros": torch.zeros(3, 5, dtype=torch.int32)}, "up_proj.qzeros has shape [3, 5], expected [3, 4]"),
        ({"qweight": torch.zeros(12, ROWS)}, "up_proj.qweight is F32, expected I32"),
        ({"qweight": torch.zeros(0, ROWS, dtype=torch.int32)}, "up_proj.qweight has shape [0, 32], expected two"),
        ({"qweight": torch.zeros(13, ROWS, dtype=torch.int32)}, "up_proj.qweight has shape [13, 32], which is not 96"),
        ({"scales": torch.ones(3, 16, dtype=torch.half)}, "up_proj.scales has shape [3, 16], expected [3, 32]"),
        ({"scales": torch.full((3, ROWS), torch.nan).half()}, "up_proj.scales holds NaN or infinite scales"),
        ({"g_idx": torch.full((COLUMNS,), 3, dtype=torch.int32)}, "g_idx names groups 3 to 3, there are 0 to 2"),
        ({"g_idx": torch.full((COLUMNS,), -1, dtype=torch.int32)}, "up_proj.g_idx names groups -1 to -1"),
        ({"g_idx": torch.zeros(COLUMNS)}, "up_proj.g_idx is F32, expected I32 or I64"),
        ({"g_idx": None, "scales": torch.ones(5, ROWS)}, "up_proj.g_idx is missing, and 5 groups do not divide 96"),
        ({"weight": torch.ones(ROWS, COLUMNS)}, "up_proj.weight is there twice, packed and dense"),
    ],
)  # fmt: skip
def test_broken_tensors(new: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    message = refusal(store(tmp_path, changed(linear()[0], **new), config()))
    assert said in message
    assert message.startswith(NAME)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"checkpoint_format": "marlin"}, "packed as 'marlin', which cannot be read"),
        ({"is_marlin_format": True}, "packed as 'marlin', which cannot be read"),
        ({"checkpoint_format": ["gptq"]}, "packed as ['gptq'], which cannot be read"),
        ({"bits": None}, "is not 96 columns of None bits"),
    ],
)
def test_other_packings(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(store(tmp_path, linear()[0], config(**more)))
