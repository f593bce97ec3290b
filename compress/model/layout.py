"""The structure of a decoder, read off tensor names and shapes: no torch, no list of models.

Blocks are the numbered tensors that hold most parameters (`model.layers.7.…`); linears are the two-dimensional
weights inside them. Whatever does not look like that is refused here, by name, before any work.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.checkpoint.read import quantization_of
from llmpare.compress.errors import InputError, UnsupportedError
from llmpare.compress.model import mixtures
from llmpare.compress.model.mixtures import Expert

SUPPORTED = (
    "Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3 (text), Phi-3, OPT, GPT-2, GPT-NeoX, the mixtures of experts of "
    "Mixtral, Qwen3, OLMoE, Granite, DeepSeek-V3 and gpt-oss, and decoders built like them, also beside a vision tower"
)
_TOWER = re.compile(r"(^|\.)(vis|img|image|multi_?modal|mm_)")  # parts of a model that also sees, blocks among them
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
    expert: which one it belongs to, in a mixture. If the experts' weights are one tensor, `name` and `weight` are
    made up for its part of `tensor`.
    """

    name: str
    block: int
    rows: int
    columns: int
    dtype: str
    transposed: bool = False
    expert: Expert | None = None

    @property
    def weight(self) -> str:
        """Name of its weight tensor."""
        return f"{self.name}.weight"

    @property
    def tensor(self) -> str:
        """Name of the tensor in the checkpoint that holds its weight."""
        return self.weight if self.expert is None or self.expert.fused is None else self.expert.fused


@dataclass(frozen=True)
class Layout:
    """Tensor names by the place they have in the model."""

    architecture: str
    prefix: str  # what precedes the block number, such as 'model.layers'
    blocks: tuple[tuple[str, ...], ...]  # the tensors of every block, in the order of the checkpoint
    linears: tuple[Linear, ...]
    outside: tuple[str, ...]  # embeddings, final norm, head, and whatever no block claims
    gates: tuple[Linear, ...] = ()  # what routes tokens to experts, or weighs those that all share: never touched

    @cached_property
    def experts(self) -> tuple[Linear, ...]:
        """The linears that belong to experts."""
        return tuple(linear for linear in self.linears if linear.expert is not None)

    def of_block(self, index: int) -> tuple[Linear, ...]:
        """The linears of one block."""
        return self._by_block.get(index, ())

    @cached_property
    def _by_block(self) -> dict[int, tuple[Linear, ...]]:
        found: dict[int, list[Linear]] = defaultdict(list)
        for linear in self.linears:
            found[linear.block].append(linear)
        return {index: tuple(linears) for index, linears in found.items()}


def sees(config: Mapping[str, Any]) -> bool:
    """Whether the decoder is a part of a model that also looks at images."""
    return all(isinstance(config.get(part), Mapping) for part in ("vision_config", "text_config"))


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the decoder: models that also see keep them in a section of their own."""
    return {**config, **config["text_config"]} if sees(config) else config


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
    tensors = checkpoint.tensors
    if sees(config):
        tensors = {name: info for name, info in tensors.items() if not _TOWER.search(name)}
    prefix, numbered = _blocks(tensors, architecture)
    count = find(decoder_config(config), "num_hidden_layers", "n_layer", "n_layers", default=len(numbered))
    if not 0 < count <= len(numbered) or any(index not in numbered for index in range(count)):
        raise InputError(
            f"config.json promises {count} blocks, the weights hold {len(numbered)} under {prefix!r}",
            "the checkpoint is incomplete: download it again",
        )
    blocks = tuple(tuple(numbered[index]) for index in range(count))
    inside = {name for block in blocks for name in block}
    linears: list[Linear] = []
    gates: list[Linear] = []
    for index, block in enumerate(blocks):
        found, routing = _linears(checkpoint, architecture, f"{prefix}.{index}".lstrip("."), index, block)
        linears += found
        gates += routing
    if not linears:
        raise _unsupported(architecture, f"no two-dimensional weight was found under {prefix!r}")
    told = any("expert" in name for name in config)
    for linear in linears:
        if linear.expert is not None and not told:
            shape = list(checkpoint.tensors[linear.tensor].shape)
            raise _unsupported(
                architecture, f"{linear.tensor} {shape} is part of a mixture of experts, and config.json has none"
            )
    outside = tuple(name for name in checkpoint.tensors if name not in inside)
    return Layout(architecture, prefix, blocks, tuple(linears), outside, tuple(gates))


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(
            "config.json names no architecture", 'it needs a line such as "architectures": ["LlamaForCausalLM"]'
        )
    name = names[0]
    if config.get("is_encoder_decoder"):
        raise _unsupported(name, "it is an encoder-decoder")
    for part in ("audio_config",):
        if part in config:
            raise _unsupported(name, f"it has an {part}: models of more than text and images are not supported")
    for part, other in (("vision_config", "text_config"), ("text_config", "vision_config")):
        if part in config and not sees(config):
            raise _unsupported(name, f"it has a {part}, but no {other} beside it")
    if find(decoder_config(config), "hidden_size_per_layer_input", default=0):
        raise _unsupported(name, "its blocks take arguments that depend on the tokens (hidden_size_per_layer_input)")
    if not sees(config) and not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise _unsupported(name, "only causal language models (…ForCausalLM, …LMHeadModel) are, with or without vision")
    return name


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    """Rounding what is rounded already would hide how much the first rounding lost."""
    found = quantization_of(config)
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown"
        raise InputError(
            f"the model is already quantized (config.json, method {method!r})",
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


def _linears(
    checkpoint: Source, architecture: str, prefix: str, index: int, block: tuple[str, ...]
) -> tuple[list[Linear], list[Linear]]:
    """The linears of a block, and its gates. prefix: of the block."""
    own = mixtures.own_weights(prefix, block)
    plain: list[Header] = []
    fused: list[Header] = []
    for name in block:
        info = checkpoint.tensors[name]
        if _is_convolution(info):
            continue
        if len(info.shape) > 2 and not mixtures.fused(info):
            raise _unsupported(architecture, f"{name} {list(info.shape)} is neither a linear nor part of experts")
        if len(info.shape) == 3 or (len(info.shape) == 2 and name.endswith(".weight")):
            if info.dtype not in _FLOATS:
                raise InputError(
                    f"{name} is {info.dtype}; weights must be {', '.join(_FLOATS)}", "start from the original model"
                )
            (fused if len(info.shape) == 3 else plain).append(info)
    transposed = _stored_transposed(checkpoint, plain)
    linears = []
    for info in plain:
        columns, rows = info.shape if transposed else info.shape[::-1]
        name = info.name.removesuffix(".weight")
        linears.append(Linear(name, index, rows, columns, info.dtype, transposed, own.get(info.name)))
    for info in fused:
        turned = _fused_transposed(checkpoint, info)
        columns, rows = info.shape[1:] if turned else info.shape[:0:-1]
        for name, expert in mixtures.of_fused(info):
            linears.append(Linear(name, index, rows, columns, info.dtype, turned, expert))
    experts = {linear.expert for linear in linears if linear.expert is not None}
    shapes = {linear.weight: (linear.rows, linear.columns) for linear in linears if linear.expert is None}
    gates = mixtures.gates(prefix, experts, shapes)
    return [n for n in linears if n.weight not in gates], [n for n in linears if n.weight in gates]


def _fused_transposed(checkpoint: Source, info: Header) -> bool:
    """Whether experts are stored as [experts, input, output]: told by their biases [experts, output]."""
    bias = checkpoint.tensors.get(f"{info.name.removesuffix('.weight')}_bias")
    return bias is not None and bias.shape == (info.shape[0], info.shape[2])


def _is_convolution(info: Header) -> bool:
    """Whether it is a filter [channels, 1, length] over time, one per channel: few weights, which stay dense."""
    return len(info.shape) == 3 and info.shape[1] == 1


def _stored_transposed(checkpoint: Source, weights: list[Header]) -> bool:
    """Whether a block stores [input, output] (Conv1D): its biases then have the length of the second dimension."""
    for info in weights:
        bias = checkpoint.tensors.get(info.name.removesuffix("weight") + "bias")
        if bias is not None and info.shape[0] != info.shape[1]:
            return bias.shape == (info.shape[1],)
    return False
