"""What windows take while they pass through a block, and how many of them pass at once; no torch.

Measured on every family that is tested, and rounded up.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmpare.compress.batches import batch_tokens, mixing_at_once
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.model.layout import Linear, Source, decoder_config, find

_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"  # of transformers, as the code of a model calls them
_SCORES = 12  # bytes for a pair of tokens: its score before and after the mask, and its weight, all in float32
_STATES = 16  # the same for a pair in a chunk of a state space
_DELTA_CHUNK, _DELTA_STATES = 64, 36  # tokens in a chunk of the gated delta rule; bytes for each of its values


def windows_at_once(source: Source, seqlen: int, device: str) -> int:
    """Windows of `seqlen` tokens that pass through a block of this model at once, if there are as many.

    Whatever memory there is: sums over tokens are taken batch by batch, so another number is another output.
    """
    mixed = mixing(source, seqlen, device) * seqlen
    fit = batch_tokens(device) // seqlen
    return max(1, min(fit, mixing_at_once(device) // mixed) if mixed else fit)


def per_token(
    source: Source, linears: Sequence[Linear], columns: int, hidden: int, *, dtype: str, seqlen: int, device: str
) -> int:
    """Bytes that a token takes at most inside a block, beside the hidden states that enter it.

    linears: of all blocks. columns: of the widest input whose statistics are taken; 0: none are.
    """
    size, routed = tensor_bytes(dtype, (1,)), experts_per_token(decoder_config(source.config))
    mixture = any(linear.expert is not None for linear in linears)
    rows = max(linear.rows * (1 if linear.expert is None else routed) for linear in linears)
    # the widest thrice, beside the residual stream, queries, keys and values, and a row of a mask
    passing = (3 * rows + 6 * hidden) * size + 4 * seqlen
    routing = routed * hidden * (size + 4) if mixture else 0  # what enters experts, and leaves them in float32
    widened = 4 * columns if device == "cpu" and size < 4 else 0  # a CPU sums in float32 only what is float32
    return passing + routing + mixing(source, seqlen, device) + widened


def waiting(source: Source, linears: Sequence[Linear], hidden: int, *, dtype: str, seqlen: int, device: str) -> int:
    """Bytes that a token costs that waits inside a block until the next of its linears is solved.

    linears: of that block. Whatever the code of a layer has named stays until the layer is left: besides what is
    counted by name below, the residual stream, its norm, and what attention beside the FFN has put out.
    """
    config = decoder_config(source.config)
    layers: dict[str, list[Linear]] = defaultdict(list)
    for linear in linears:
        if linear.expert is None:
            layers[linear.name.rpartition(".")[0]].append(linear)
    # a third is what has a name, unless the model does without transformers' attention functions
    mixed = mixing(source, seqlen, device) // (3 if _FUNCTIONS in _code(source, config) else 1)
    # the one with the widest output is the FFN; if gate and up are one matrix, all of that stays until the end
    widest = max(linears, key=lambda linear: linear.rows)
    inner = widest_input(linears, experts_per_token(config), hidden)
    held = [inner + (widest.rows if widest.expert is None and widest.rows > inner else 0)]
    for layer in layers.values():
        if widest not in layer:  # attention: queries, keys and values, and what they make
            entering = [linear.rows for linear in layer if linear.columns == hidden]
            # rotated, they replace what they were made from, unless that is one matrix
            held.append(sum(entering) * (2 if len(entering) == 1 else 1) + max(linear.columns for linear in layer))
    return tensor_bytes(dtype, (1,)) * (3 * hidden + max(held)) + mixed


def widest_input(linears: Sequence[Linear], routed: int, hidden: int) -> int:
    """The widest input of a linear in a block, per token; experts' own are what `routed` of them made of it."""
    inner = [linear.columns for linear in linears if linear.expert is not None and linear.rows == hidden]
    return max(max(linear.columns for linear in linears), routed * max(inner, default=0))


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Experts that a mixture sends every token through; 1 for any other model. config: of its decoder."""
    return int(find(config, "num_experts_per_tok", "num_experts_per_token", default=1))


def mixing(source: Source, seqlen: int, device: str) -> int:
    """Bytes that a token costs where tokens are mixed without a fused kernel; 0 where all mixing is fused.

    The largest of what the layers of a hybrid take: attention that holds the scores of all pairs of tokens, state
    spaces that do so in chunks, the gated delta rule.
    """
    config = decoder_config(source.config)

    def size(*names: str) -> int:
        return int(find(config, *names, default=0))

    heads = size("num_attention_heads", "n_head", "n_heads")
    attention = 0 if _fused(source, device) else heads * seqlen * _SCORES
    chunk = min(seqlen, size("mamba_chunk_size", "chunk_size"))
    states = size("mamba_n_heads", "num_heads") * chunk * _STATES
    delta = size("linear_num_value_heads") * (_DELTA_CHUNK * _SCORES + size("linear_value_head_dim") * _DELTA_STATES)
    return max(attention, states, delta)


def _fused(source: Source, device: str) -> bool:
    """Whether attention never holds all scores: its code uses fused kernels, and these take what it is like.

    They take no positions that are biases of the scores (`alibi`), one key for all heads (`multi_query`) only where
    transformers repeats it, and on the CPU no values of another width than keys.
    """
    config = decoder_config(source.config)
    code = _code(source, config)
    repeated = config.get("multi_query") is not True or _FUNCTIONS in code
    keys = find(config, "qk_nope_head_dim", default=0) + find(config, "qk_rope_head_dim", default=0)
    alike = device != "cpu" or not keys or keys == find(config, "v_head_dim", default=keys)
    return "_supports_sdpa = True" in code and repeated and alike and config.get("alibi") is not True


def _code(source: Source, config: Mapping[str, Any]) -> str:
    """The text of the model's code, which to import would import torch; empty if it is not where it should be."""
    kind = str(config.get("model_type", "")).replace("-", "_").removesuffix("_text")
    library = find_spec("transformers")
    folders = library.submodule_search_locations if library else None
    files = [Path(folder, "models", kind, f"modeling_{kind}.py") for folder in folders or ()]
    if source.config.get("auto_map"):
        files = sorted(source.folder.glob("modeling*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
