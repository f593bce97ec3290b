"""Checkpoints small enough to be compressed in a fraction of a second, and the command lines that do it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmpare import calibration_data

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HIDDEN, INNER, HEADS, VOCABULARY = 64, 128, 2, 4096

Change = Callable[[Tensor], Tensor]


def config(*, blocks: int = 2, tied: bool = False) -> dict[str, object]:
    """config.json of the model below."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HIDDEN // HEADS,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def tensors(*, blocks: int = 2, tied: bool = False) -> dict[str, Tensor]:
    """Random weights, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    kv = HIDDEN // HEADS
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    if not tied:
        shapes["lm_head"] = (VOCABULARY, HIDDEN)
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes[f"{block}.input_layernorm"] = shapes[f"{block}.post_attention_layernorm"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            shapes[f"{block}.self_attn.{name}_proj"] = (rows, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{block}.mlp.{name}_proj"] = (INNER, HIDDEN)
        shapes[f"{block}.mlp.down_proj"] = (HIDDEN, INNER)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        if len(shape) == 2
        else 1 + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in sorted(shapes.items())
    }


def llama(folder: Path, *, blocks: int = 2, tied: bool = False, changes: Mapping[str, Change] | None = None) -> Path:
    """A random Llama with the tokenizer of examples/tiny-llama. changes: what to do to tensors, by name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(blocks=blocks, tied=tied), indent=1))
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    weights = tensors(blocks=blocks, tied=tied)
    for name, change in (changes or {}).items():
        weights[name] = change(weights[name].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def texts(folder: Path) -> tuple[Path, Path]:
    """A little calibration and evaluation text, which share nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for part in calibration_data.PARTS:
        path = folder / f"{part}.txt"
        rows = calibration_data.rows("bundled", part)
        path.write_text("\n\n".join((next(rows).text or "")[:3000] for _ in range(2)), encoding="utf-8")
        found.append(path)
    return found[0], found[1]


def quantize(model: Path | str, out: Path | str, text: tuple[Path, Path], *more: str) -> list[str]:
    """The command line of a short run; what is in `more` wins."""
    return [
        "quantize", str(model), "-o", str(out), "--dataset", str(text[0]), "--eval-dataset", str(text[1]),
        "--nsamples", "4", "--eval-nsamples", "2", "--seqlen", "32", "--group-size", "32", "--device", "cpu", *more,
    ]  # fmt: skip
