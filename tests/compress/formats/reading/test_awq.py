"""Against a packer of its own that places one number at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stored import NAME, changed, decoded, refusal, store
from torch import Tensor

from llmpare.compress.formats.decoded import open_dense

ROWS, COLUMNS, GROUP = 24, 96, 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns whose values lie in a word from its lowest bits up


def words(values: Tensor) -> Tensor:
    """[n, values] → int32 [n, values / 8]."""
    packed = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
    for row in range(packed.shape[0]):
        for word in range(packed.shape[1]):
            for slot, column in enumerate(ORDER):
                packed[row, word] += int(values[row, 8 * word + column]) * 16**slot
    return packed.to(torch.int32)


def linear(group: int = GROUP) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random linear, and its weight in float64."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (COLUMNS, ROWS), generator=generator)
    zero = torch.randint(16, (COLUMNS // group, ROWS), generator=generator)
    scale = torch.randn(zero.shape, generator=generator).half()
    expected = (codes - zero.repeat_interleave(group, 0)) * scale.double().repeat_interleave(group, 0)
    return {"qweight": words(codes), "qzeros": words(zero), "scales": scale}, expected.t()


def config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True, **more}


@pytest.mark.parametrize(("group", "called"), [(GROUP, "awq W4A16_ASYM g32"), (COLUMNS, "awq W4A16_ASYM channel")])
def test_decoded_by_the_book(group: int, called: str, tmp_path: Path) -> None:
    leaves, expected = linear(group)
    folder = store(tmp_path, leaves, config(group_size=group))
    assert torch.equal(decoded(folder).double(), expected)
    assert torch.equal(decoded(folder, torch.float16), expected.half())
    with open_dense(folder) as source:
        assert source.scheme == called
        assert source.tensors[f"{NAME}.weight"].dtype == "F16"


def test_the_first_word(tmp_path: Path) -> None:
    """Outputs 0 … 7 of one input, with the numbers 0 … 7, as AutoAWQ packs them."""
    leaves = {
        "qweight": torch.tensor([[0x75316420]] * 8, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    assert decoded(store(tmp_path, leaves, config(group_size=8)))[:, 0].tolist() == list(range(8))


def test_older_names_of_settings(tmp_path: Path) -> None:
    leaves, expected = linear()
    folder = store(tmp_path, leaves, {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "version": "GEMM"})
    assert torch.equal(decoded(folder).double(), expected)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"scales": None}, "up_proj.scales is missing; beside it there is qweight, qzeros"),
        ({"qzeros": None}, "up_proj.qzeros is missing"),
        ({"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, "up_proj.qzeros has shape [3, 2], expected [3, 3]"),
        ({"qweight": torch.zeros(COLUMNS, 3)}, "up_proj.qweight is F32, expected I32"),
        ({"scales": torch.ones(3, 16).half()}, "up_proj.scales has shape [3, 16], expected [3, 24]"),
        ({"scales": torch.ones(5, ROWS).half()}, "up_proj.scales has 5 groups, which do not divide 96 columns"),
        ({"scales": torch.full((3, ROWS), torch.inf).half()}, "up_proj.scales holds NaN or infinite scales"),
        ({"weight": torch.ones(ROWS, COLUMNS)}, "up_proj.weight is there twice, packed and dense"),
    ],
)
def test_broken_tensors(new: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    message = refusal(store(tmp_path, changed(linear()[0], **new), config()))
    assert said in message
    assert message.startswith(NAME)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"version": "gemv"}, "4 bits in the layout 'gemv'"), ({"bits": 8}, "has 8 bits in the layout 'gemm'")],
)
def test_other_layouts(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(store(tmp_path, linear()[0], config(**more)))
