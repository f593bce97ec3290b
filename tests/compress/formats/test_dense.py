import pytest
import torch
from families import solved

from llmpare.compress import formats
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.model.layout import Linear
from llmpare.compress.request import Scheme

FORM = formats.find("dense")
SCHEME = Scheme(4, 32)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_as_the_source_has_it(dtype: str, transposed: bool) -> None:
    linear = Linear("h.0.mlp.c_fc", 0, 64, 96, dtype, transposed)
    whole = solved(linear, SCHEME, FORM)
    (spec,) = FORM.specs(linear, SCHEME)
    tensors = FORM.encode(linear, SCHEME, whole)
    stored = tensors["h.0.mlp.c_fc.weight"]
    assert list(tensors) == [spec.name]
    assert (stored.dtype, tuple(stored.shape)) == (DTYPES[spec.dtype], spec.shape)
    assert spec.shape == ((96, 64) if transposed else (64, 96))
    expected = whole.weight().to(DTYPES[dtype])
    assert torch.equal(stored, expected.t() if transposed else expected)
    assert torch.equal(FORM.decode(linear, SCHEME, tensors), expected.float())
    assert torch.equal(FORM.weight(linear, whole), expected.float())


def test_scales_are_those_of_a_packed_checkpoint() -> None:
    linear = Linear("h.0.mlp.c_fc", 0, 64, 96, "BF16")
    assert FORM.scale_dtype(linear) == formats.find("compressed-tensors").scale_dtype(linear) == "BF16"


def test_nothing_but_the_weights_changes() -> None:
    schemes: dict[Linear, Scheme | None] = {Linear("h.0.mlp.c_fc", 0, 64, 96, "F32", True): SCHEME}
    FORM.check(schemes)
    assert FORM.config(schemes, SCHEME, ["lm_head"]) is None
    assert FORM.files(schemes, SCHEME) == {}
    assert FORM.aliases({"dtype": "float32", "rope_parameters": {"rope_theta": 1e6}}) == {}
    (note,) = FORM.notes(schemes)
    assert "saves no space" in note
