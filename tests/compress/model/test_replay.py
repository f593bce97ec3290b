from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MATRIX, SLIDING, float32_logits, load, read, skeleton, tokens, write
from torch import Tensor, nn

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import layout
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in MATRIX},
    **{f"{name}, tied the other way": {"family": name, "tied": not f.tied} for name, f in FAMILIES.items()},
    **{
        f"llama, {precision}, {'sharded' if sharded else 'one file'}": {
            "family": "llama",
            "dtype": dtype,
            "sharded": sharded,
        }
        for precision, dtype in PRECISIONS.items()
        for sharded in (True, False)
    },
    "gemma2, fp32": {"family": "gemma2", "dtype": torch.float32},
    "gpt2, bf16": {"family": "gpt2", "dtype": torch.bfloat16},
    "opt, bf16, projections, norms last": {
        "family": "opt",
        "dtype": torch.bfloat16,
        "settings": {"word_embed_proj_dim": 64, "do_layer_norm_before": False},
    },
}


@contextmanager
def streaming(folder: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[Replay, Skeleton, Checkpoint]]:
    with Checkpoint.open(folder) as checkpoint:
        made = skeleton(checkpoint, dtype)
        made.place(read(checkpoint, layout(checkpoint).blocks[0]))
        yield Replay(made), made, checkpoint


@torch.no_grad()
def streamed(replay: Replay, made: Skeleton, checkpoint: Checkpoint, ids: Tensor) -> list[Tensor]:
    """What enters block 0, then what leaves each block, with one block in memory at a time."""
    states = [replay.embed(ids)]
    for index, names in enumerate(layout(checkpoint).blocks):
        made.place(read(checkpoint, names))
        states.append(replay.run(index, states[-1]))
        made.unload(index)
    return states


@torch.no_grad()
def states(model: nn.Module, blocks: str, ids: Tensor) -> list[Tensor]:
    """The same of a whole model, by its own forward."""
    found: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not found:
            found.append(args[0] if args else kwargs["hidden_states"])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        found.append(out if isinstance(out, Tensor) else out[0])

    for block in model.get_submodule(blocks).children():
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
    model(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_block_by_block_is_the_whole_model(variant: str, tmp_path: Path) -> None:
    """To the last bit, hidden states; logits up to the rounding of the head, whose product is kept in float32."""
    folder, ids = write(tmp_path, **VARIANTS[variant]), tokens()
    reference = load(folder)
    expected = states(reference, MATRIX[VARIANTS[variant]["family"]].blocks, ids)
    with streaming(folder) as (replay, made, checkpoint):
        found = streamed(replay, made, checkpoint, ids)
        assert len(found) == len(expected) == 3
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        logits = replay.logits(ids, found[-1], 0, ids.shape[1])
        part = replay.logits(ids, found[-1], 5, 9)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, float32_logits(reference, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(part, logits[:, 5:9], rtol=0, atol=1e-5)
    with torch.no_grad():
        theirs = reference(ids).logits
    precision = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[reference.dtype]
    torch.testing.assert_close(logits, theirs.float(), rtol=precision, atol=precision)


@pytest.mark.parametrize("family", MATRIX)
def test_half_precision_runs_in_float32(family: str, tmp_path: Path) -> None:
    """To the last bit what transformers computes in float32; the largest tensors stay as they are stored."""
    folder, ids = write(tmp_path, family, dtype=torch.bfloat16), tokens()
    reference = load(folder, dtype=torch.float32)
    expected = states(reference, MATRIX[family].blocks, ids)
    with streaming(folder, torch.float32) as (replay, made, checkpoint):
        found = streamed(replay, made, checkpoint, ids)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)
        logits = replay.logits(ids, found[-1], 0, ids.shape[1])
        assert made.model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert made.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    if family != "mamba2":  # its own forward rounds hidden states to the precision of the head
        torch.testing.assert_close(logits, float32_logits(reference, ids), rtol=0, atol=1e-5)


def test_linears_widen_their_weights_when_they_are_called(tmp_path: Path) -> None:
    """A block takes the memory that it takes on disk; what is put in place of a weight is kept in full."""
    folder = write(tmp_path, "llama", dtype=torch.bfloat16)
    with streaming(folder, torch.float32) as (_, made, checkpoint):
        source = read(checkpoint, layout(checkpoint).blocks[0])
        made.place(source)
        for linear in layout(checkpoint).of_block(0):
            stored = made.module(linear.name).weight
            assert stored.data_ptr() == source[linear.weight].data_ptr()
            made.put(linear, stored.float() * 1.001)
            assert torch.equal(made.module(linear.name).weight, stored.float() * 1.001)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_sliding_windows_are_replayed(family: str, tmp_path: Path) -> None:
    """The models above are such that it shows: without its window, the model says something else."""
    folder, ids = write(tmp_path / "sliding", family), tokens()
    settings: dict[str, Any] = {"sliding_window": 4 * SLIDING}
    wide = load(write(tmp_path / "wide", family, settings=settings))
    assert not torch.equal(load(folder)(ids).logits, wide(ids).logits)


def test_windows_of_several_shapes(tmp_path: Path) -> None:
    folder = write(tmp_path, "gemma3_text")
    reference = load(folder)
    with streaming(folder) as (replay, made, checkpoint):
        for windows, length in ((1, 8), (3, 40), (2, 64), (1, 8)):
            ids = tokens(windows, length)
            found = streamed(replay, made, checkpoint, ids)
            reference = load(folder)
            for ours, theirs in zip(found, states(reference, "model.layers", ids), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_block_can_run_first(family: str, tmp_path: Path) -> None:
    """Its arguments depend on nothing but the shape, so no text is needed to find them."""
    with streaming(write(tmp_path, family)) as (replay, _, _):
        ids = tokens()
        hidden = replay.embed(ids)
        with torch.no_grad():
            expected = replay.run(0, hidden)
    with streaming(tmp_path) as (replay, _, _), torch.no_grad():
        assert torch.equal(replay.run(0, hidden), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_weights_in_place_of_the_block_s_own(family: str, tmp_path: Path) -> None:
    with streaming(write(tmp_path, family, dtype=torch.float32)) as (replay, made, _):
        hidden = replay.embed(tokens(2, 16))
        own = dict(made.blocks[0].named_parameters())
        replaced = {name: (value * 1.1).requires_grad_() for name, value in own.items() if value.ndim == 2}
        out = replay.run(0, hidden, replaced)
        out.sum().backward()
        assert all(value.grad is not None and value.grad.any() for value in replaced.values())
        for name, value in made.blocks[0].named_parameters():
            assert value is own[name]
        with torch.no_grad():
            assert not torch.allclose(replay.run(0, hidden), out)
            for name, value in replaced.items():
                own[name].copy_(value)
            torch.testing.assert_close(replay.run(0, hidden), out)


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    with streaming(write(tmp_path, "llama")) as (replay, made, checkpoint):
        ids = tokens(1, 8)
        before = [vars(module).get("forward") for module in made.model.modules()]
        replay.logits(ids, replay.embed(ids), 0, 8)
        assert [vars(module).get("forward") for module in made.model.modules()] == before
        assert not any(module._forward_hooks for module in made.model.modules())
        made.place(read(checkpoint, layout(checkpoint).blocks[1]))
        assert torch.equal(made.model(ids).logits, load(tmp_path)(ids).logits)


def test_arguments_that_depend_on_the_tokens_are_refused(tmp_path: Path) -> None:
    """As in a model that masks a padding token by itself: what block 0 got for one window is wrong for another."""
    with streaming(write(tmp_path, "llama")) as (replay, made, _):
        base = made.model.base_model
        whole = base.forward

        def masking(input_ids: Tensor, use_cache: bool) -> Any:
            return whole(input_ids=input_ids, attention_mask=(input_ids > 0).long(), use_cache=use_cache)

        base.forward = masking
        ids = tokens(2, 16).clamp(min=1)
        ids[0, :4] = 0
        replay.embed(ids)
        ids[0, :4] = 1
        with pytest.raises(
            InputError, match="LlamaForCausalLM is not supported: its blocks take arguments that depend"
        ):
            replay.embed(ids)
