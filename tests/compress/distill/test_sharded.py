"""A pupil that lies in parts on several processes, and where that cannot be had."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmpare.cli.exits import main

SHARDED = """
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from llmpare.compress.distill.early_exit import EarlyExit
from llmpare.compress.distill.losses import Objective
from llmpare.compress.distill.pupil import Pupil
from llmpare.compress.distill.teachers import LiveTeacher

SHAPE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2)


def pupil(tied):
    def model(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, tie_word_embeddings=tied, **SHAPE))

    student, teacher = model(0), LiveTeacher(model(1))
    exits = EarlyExit(teacher, Objective(), [1], dropout=0.0)
    exits.prepare(student)
    return Pupil(student, teacher, Objective(), [exits])


def step(trained, optimizer, windows, processes):
    optimizer.zero_grad()
    loss = trained(ids[windows], ids[windows][:, 1:], torch.arange(4)[windows], 60)["loss"]
    (processes * loss).backward()  # gradients are averaged over the processes
    nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()


distributed.init_process_group("gloo")
rank = distributed.get_rank()
ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(3))
for tied in (False, True):
    start, whole, parts = pupil(tied), pupil(tied), pupil(tied)
    for block in parts.student.model.layers:
        fully_shard(block)
    fully_shard(parts)
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (whole, parts)]
    for _ in range(3):
        step(whole, optimizers[0], slice(0, 4), 1)
        step(parts, optimizers[1], slice(2 * rank, 2 * rank + 2), 2)
    named = zip(start.named_parameters(), whole.parameters(), parts.parameters(), strict=True)
    for (name, before), alone, shard in named:
        assert shard.to_local().numel() < alone.numel(), name
        together = shard.full_tensor()
        assert (alone - before).norm() > 0, name
        assert (alone - together).norm() < 1e-4 * (alone - before).norm(), name
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_pupil_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    """By PyTorch's own sharding, over two processes on the CPU: blocks apart, exits and the shared head included."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_sharding_on_the_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """accelerate would leave it out without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    out = tmp_path / "out"
    assert main(["distill", "--teacher", "x", "--student", "y", "-o", str(out), "--device", "cpu", "--quiet"]) == 2
    assert "shards a model over GPUs only" in capsys.readouterr().err
    assert not out.exists()
