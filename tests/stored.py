"""Checkpoints of single linears as other tools store them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmpare.compress.errors import InputError
from llmpare.compress.formats.decoded import open_dense

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"


def store(folder: Path, leaves: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, **config: Any) -> Path:
    """A checkpoint of one linear made of `leaves`, and a norm that is no part of it."""
    folder.mkdir(parents=True, exist_ok=True)
    more = {} if quantization is None else {"quantization_config": dict(quantization)}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config, **more}))
    tensors = {f"{NAME}.{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def decoded(folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """The linear's weight."""
    with open_dense(folder) as source:
        assert set(source.tensors) == {WEIGHT, "model.norm.weight"}
        weight = source.tensor(WEIGHT, dtype)
        assert tuple(weight.shape) == source.tensors[WEIGHT].shape
        return weight


def refusal(folder: Path) -> str:
    """What is said of a checkpoint that cannot be read, by its headers or while its linear is decoded."""
    try:
        with open_dense(folder) as source:
            source.tensor(WEIGHT)
    except InputError as error:
        return f"{error.message} | {error.hint}"
    raise AssertionError("it was read")


def changed(leaves: Mapping[str, Tensor], **new: Tensor | None) -> dict[str, Tensor]:
    """The leaves with some in the place of others; None takes one away."""
    return {name: value for name, value in {**leaves, **new}.items() if value is not None}
