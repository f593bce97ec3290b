"""What windows were said to take inside a block, and what they take."""

from pathlib import Path

import pytest
import torch
from families import MATRIX, MIXTURES, TINY_LLAMA, read, skeleton, write
from live import Live

from llmpare.compress.activations import mixing, per_token, waiting, windows_at_once
from llmpare.compress.batches import batch_tokens, mixing_at_once
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.gram import shared_inputs
from llmpare.compress.model.layout import decoder_config, find, layout
from llmpare.compress.model.replay import Replay
from llmpare.compress.stages import staged
from llmpare.compress.streams import Stream

WINDOWS, LENGTH = 2, 256  # as long as the models allow: what attention holds grows with it


def taken(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of all tensors that were alive at once while windows passed through a block."""
    made, found, peak = skeleton(checkpoint, DTYPES[dtype]), layout(checkpoint), 0
    made.place(read(checkpoint, found.blocks[0]))
    replay = Replay(made)
    states = replay.embed(torch.randint(2, 4096, (WINDOWS, LENGTH)))
    for index, names in enumerate(found.blocks):
        made.place(read(checkpoint, names))
        with torch.no_grad(), Live() as live:
            replay.run(index, states)
        peak = max(peak, live.peak)
    return peak


@pytest.mark.parametrize("name", [*MATRIX, *MIXTURES])
def test_no_family_takes_more_inside_a_block_than_was_said(name: str, tmp_path: Path) -> None:
    """Nor far less, which would refuse runs that fit."""
    with Checkpoint.open(write(tmp_path / "model", name)) as checkpoint:
        linears = layout(checkpoint).linears
        hidden = find(decoder_config(checkpoint.config), "hidden_size", "n_embd", "d_model")
        for dtype in ("F32", "BF16"):
            said = per_token(checkpoint, linears, 0, hidden, dtype=dtype, seqlen=LENGTH, device="cpu")
            assert 1 <= said * WINDOWS * LENGTH / taken(checkpoint, dtype) < 2.6, dtype


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "bloom", "gemma2", "mamba2", "qwen3_next", "olmoe"])
def test_windows_that_wait_inside_a_block_hold_no_more_than_was_said(name: str, tmp_path: Path) -> None:
    """One waits while the next comes, in every layer and at every linear."""
    waits = 5
    with Checkpoint.open(write(tmp_path / "model", name)) as checkpoint, torch.no_grad():
        made, found = skeleton(checkpoint, torch.float32), layout(checkpoint)
        hidden = find(decoder_config(checkpoint.config), "hidden_size", "n_embd", "d_model")
        told = {"dtype": "F32", "seqlen": LENGTH, "device": "cpu"}
        passing = per_token(checkpoint, found.linears, 0, hidden, **told)
        made.place(read(checkpoint, found.blocks[0]))
        replay = Replay(made)
        stream = Stream.enter(torch.randint(2, 4096, (waits + 1, LENGTH)), replay, 1)
        linears = {n: m for n, m in made.blocks[0].named_modules() if isinstance(m, torch.nn.Linear)}
        groups = shared_inputs(linears, lambda: replay.run(0, stream.hidden[0]))
        with Live() as live:
            for _, travellers in staged(replay, 0, linears, groups, stream):
                assert len(list(travellers)) == waits + 1
        said = waits * waiting(checkpoint, found.of_block(0), hidden, **told) + passing
        assert 1 <= said * LENGTH / live.peak < 4


def test_statistics_of_half_precision_are_summed_in_float32_on_the_cpu() -> None:
    with Checkpoint.open(TINY_LLAMA) as checkpoint:

        def extra(dtype: str, device: str) -> int:
            some, none = (
                per_token(checkpoint, layout(checkpoint).linears, columns, 64, dtype=dtype, seqlen=8, device=device)
                for columns in (1000, 0)
            )
            return some - none

        assert extra("BF16", "cpu") == 4000
        assert extra("F32", "cpu") == extra("BF16", "cuda") == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fewer_windows_pass_at_once_where_attention_holds_all_scores(device: str, tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path / "fused", "llama")) as fused:
        assert mixing(fused, 2048, device) == 0
        assert windows_at_once(fused, 2048, device) == batch_tokens(device) // 2048
        assert windows_at_once(fused, 10**6, device) == 1
    with Checkpoint.open(write(tmp_path / "apart", "gemma2")) as apart:
        heads = apart.config["num_attention_heads"]
        assert mixing(apart, 2048, device) == heads * 2048 * 12
        at_once = windows_at_once(apart, 8192, device)
        held = heads * 8192**2 * 12
        assert at_once == max(1, min(batch_tokens(device) // 8192, mixing_at_once(device) // held)) < 4
