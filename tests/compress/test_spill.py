"""Hidden states that wait in a file."""

import os
from pathlib import Path

import pytest
import torch

from llmpare.compress.checkpoint.files import is_temporary
from llmpare.compress.spill import Spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 3, 5).to(dtype), torch.randn(1, 3, 5).to(dtype)]
    with Spill(tmp_path) as spill:
        kept = spill.keep(tensors)
        assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))
        other = kept.copy()
        kept[1] = tensors[1] + 1
        assert torch.equal(kept[1], tensors[1] + 1)
        assert torch.equal(other[1], tensors[1])
        assert os.listdir(tmp_path) == []


def test_a_kill_before_its_file_loses_its_name_leaves_what_the_next_run_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "unlink", lambda path: None)
    with Spill(tmp_path):
        assert [is_temporary(name) for name in os.listdir(tmp_path)] == [True]
