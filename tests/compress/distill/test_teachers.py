"""Teachers that predict while the student learns."""

from pathlib import Path

import torch
from families import load, tokens, write

from llmpare.compress.distill.targets import Batch
from llmpare.compress.distill.teachers import LiveTeacher


def test_a_teacher_reads_in_its_own_precision(tmp_path: Path) -> None:
    """Whatever the student is trained in: half precision would round away what is to be learned."""
    ids = tokens()
    batch = Batch(ids, torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool), None)
    model = load(write(tmp_path, "llama")).float()
    alone, _ = LiveTeacher(model).read(batch)
    with torch.autocast("cpu", torch.bfloat16):
        beside, _ = LiveTeacher(model).read(batch)
        assert model.lm_head(alone).dtype == torch.bfloat16, "or nothing is tested"
    assert torch.equal(alone, beside)
