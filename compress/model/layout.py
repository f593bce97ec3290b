"""The structure of a decoder, read off tensor names and shapes: no torch, no list of models.

Blocks are the numbered tensors that hold most parameters (`model.layers.7.…`); linears are the two-dimensional
weights inside them. Whatever does not look like that is refused here, by name, before any work.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.errors import InputError, UnsupportedError

SUPPORTED = (
    "Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3 (text), Phi-3, OPT, GPT-2, GPT-NeoX and decoders built like them"
)
_FLOATS = ("F32", "F16", "BF16")


class Header(Protocol):
    """What is known of a tensor before it is read. dtype as safetensors spells it."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """What a model is built from: a Checkpoint, or a DenseSource that decodes one. tensors: by name."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Header]: ...


@dataclass(frozen=True)
class Linear:
    """One linear of a block. `name` is its name in the checkpoint, without '.weight'.

    rows × columns is output × input features, also when `transposed`: Conv1D stores the weight as [input, output].
    """

    name: str
    block: int
    rows: int
    columns: int
    dtype: str
    transposed: bool = False

    @property
    def weight(self) -> str:
        """Name of its weight tensor in the checkpoint."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Layout:
    """Tensor names by the place they have in the model."""

    architecture: str
    prefix: str  # what precedes the block number, such as 'model.layers'
    blocks: tuple[tuple[str, ...], ...]  # the tensors of every block, in the order of the checkpoint
    linears: tuple[Linear, ...]
    outside: tuple[str, ...]  # embeddings, final norm, head, and whatever no block claims

    def of_block(self, index: int) -> tuple[Linear, ...]:
        """The linears of one block."""
        return tuple(linear for linear in self.linears if linear.block == index)


def find(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of several names of the same size that the config has: families disagree on spelling.

    Raises InputError for a size that is no whole number from 0.
    """
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        return default
    if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 0:
        raise InputError(
            f"config.json: {name} is {clipped(repr(config[name]))}, and a whole number is needed", "download it again"
        )
    return config[name]


def layout(checkpoint: Source) -> Layout:
    """The structure of a checkpoint. Raises InputError when it is none that can be compressed."""
    config = checkpoint.config
    architecture = _architecture(config)
    _refuse_quantized(config)
    prefix, numbered = _blocks(checkpoint.tensors, architecture)
    count = find(config, "num_hidden_layers", "n_layer", "n_layers", default=len(numbered))
    if not 0 < count <= len(numbered) or any(index not in numbered for index in range(count)):
        raise InputError(
            f"config.json promises {count} blocks, the weights hold {len(numbered)} under {prefix!r}",
            "the checkpoint is incomplete: download it again",
        )
    blocks = tuple(tuple(numbered[index]) for index in range(count))
    inside = {name for block in blocks for name in block}
    linears = tuple(
        linear for index, block in enumerate(blocks) for linear in _linears(checkpoint, architecture, index, block)
    )
    if not linears:
        raise _unsupported(architecture, f"no two-dimensional weight was found under {prefix!r}")
    outside = tuple(name for name in checkpoint.tensors if name not in inside)
    return Layout(architecture, prefix, blocks, linears, outside)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(
            "config.json names no architecture", 'it needs a line such as "architectures": ["LlamaForCausalLM"]'
        )
    name = names[0]
    if config.get("is_encoder_decoder"):
        raise _unsupported(name, "it is an encoder-decoder")
    for part in ("vision_config", "audio_config", "text_config"):
        if part in config:
            raise _unsupported(name, f"it has a {part}: models of more than text are not supported yet")
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise _unsupported(name, "only causal language models (…ForCausalLM, …LMHeadModel) are")
    return name


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    """Rounding what is rounded already would hide how much the first rounding lost."""
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown"
        raise InputError(
            f"the model is already quantized (quantization_config in config.json, method {method!r})",
            "start from the original model",
        )


def _unsupported(architecture: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"architecture {architecture} is not supported: {why}", f"supported: {SUPPORTED}")


def _blocks(tensors: Mapping[str, Header], architecture: str) -> tuple[str, dict[int, list[str]]]:
    """The prefix whose numbered children hold most parameters, and their tensors by number."""
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    weight: dict[str, int] = defaultdict(int)
    for name, info in tensors.items():
        match = re.match(r"(.*?)\.?(\d+)\.", name)
        if match:
            found[match[1]][int(match[2])].append(name)
            weight[match[1]] += math.prod(info.shape)
    if not found:
        raise _unsupported(architecture, "its tensors are not numbered by block")
    prefix = max(weight, key=lambda key: weight[key])
    return prefix, found[prefix]


def _linears(checkpoint: Source, architecture: str, index: int, block: tuple[str, ...]) -> list[Linear]:
    found = []
    for name in block:
        info = checkpoint.tensors[name]
        if re.search(r"\.experts\.|\.\d+\.\D*\.\d+\.", name) or len(info.shape) > 2:
            shape = list(info.shape)
            raise _unsupported(
                architecture, f"{name} {shape} is part of a mixture of experts or a convolution, not supported yet"
            )
        if len(info.shape) == 2 and name.endswith(".weight"):
            if info.dtype not in _FLOATS:
                raise InputError(
                    f"{name} is {info.dtype}; weights must be {', '.join(_FLOATS)}", "start from the original model"
                )
            found.append(info)
    transposed = _stored_transposed(checkpoint, found)
    linears = []
    for info in found:
        columns, rows = info.shape if transposed else info.shape[::-1]
        linears.append(Linear(info.name.removesuffix(".weight"), index, rows, columns, info.dtype, transposed))
    return linears


def _stored_transposed(checkpoint: Source, weights: list[Header]) -> bool:
    """Whether a block stores [input, output] (Conv1D): its biases then have the length of the second dimension."""
    for info in weights:
        bias = checkpoint.tensors.get(info.name.removesuffix("weight") + "bias")
        if bias is not None and info.shape[0] != info.shape[1]:
            return bias.shape == (info.shape[1],)
    return False
