"""Tiny random checkpoints of every supported family, written by transformers itself.

Linears have 128 inputs or a multiple, so every group size divides them; the vocabulary is the bundled tokenizer's.
Nothing is left at its initial value: gains, biases, masks and position encodings all show in the logits.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llmpare import calibration_data
from llmpare.compress import calibration, quantize
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.tensors import DTYPES, from_info
from llmpare.compress.formats import Format
from llmpare.compress.grid import Solved
from llmpare.compress.model.layout import Linear, layout
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.request import QuantizeRequest, Scheme, TextSpec
from llmpare.compress.tokenizer import load_tokenizer

TINY_LLAMA = Path(__file__).parents[1] / "examples" / "tiny-llama"
VOCABULARY = 4096
LENGTH = 64  # tokens per window
SLIDING = 16  # shorter, so that sliding windows matter


@dataclass(frozen=True)
class Family:
    """A model type of transformers. settings: of its configuration. blocks: where its models keep them.

    odd: what sets it apart from Llama, as docs/families.md says it.
    """

    settings: Mapping[str, Any]
    blocks: str = "model.layers"
    dtype: torch.dtype = torch.bfloat16
    tied: bool = False
    sharded: bool = False
    odd: str = ""


_DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA: dict[str, Any] = {**_DECODER, "head_dim": 32}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": SLIDING}
_GEMMA: dict[str, Any] = {**LLAMA, **_LAYERS, "query_pre_attn_scalar": 32}
_HEADS: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GPT: dict[str, Any] = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
FAMILIES: dict[str, Family] = {
    "llama": Family({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}),
    "mistral": Family({**LLAMA, "sliding_window": SLIDING}, dtype=torch.float32, sharded=True, odd="sliding windows"),
    "qwen2": Family(
        {**_DECODER, **_LAYERS, "use_sliding_window": True}, tied=True, odd="biases, sliding windows in some blocks"
    ),
    "qwen3": Family(LLAMA, dtype=torch.float16, sharded=True, odd="norms of queries and keys"),
    "gemma2": Family(_GEMMA, tied=True, odd="sliding windows in some blocks, soft caps, scaled embeddings"),
    "gemma3_text": Family(_GEMMA, tied=True, sharded=True, odd="two kinds of attention with their own positions"),
    "phi3": Family(
        {**_DECODER, "pad_token_id": 0, "sliding_window": SLIDING},
        dtype=torch.float32,
        odd="q, k, v in one matrix, gate and up in another",
    ),
    "opt": Family(
        {**_HEADS, "word_embed_proj_dim": 128, "ffn_dim": 256},
        "model.decoder.layers",
        torch.float16,
        tied=True,
        odd="biases, learned positions",
    ),
    "gpt2": Family(_GPT, "transformer.h", torch.float32, tied=True, odd="Conv1D: weights stored as [input, output]"),
    "gpt_neox": Family(
        {**_HEADS, "intermediate_size": 256},
        "gpt_neox.layers",
        torch.float16,
        odd="q, k, v in one matrix, head by head; the head has another name on disk",
    ),
    "gptj": Family(
        {**_GPT, "rotary_dim": 16}, "transformer.h", odd="blocks return tuples, head with a bias, positions in no file"
    ),
}
MORE: dict[str, Family] = {
    "gemma": Family(LLAMA, tied=True, odd="scaled embeddings"),
    "phi": Family(_DECODER, odd="biases, rotary positions in a part of each head"),
    "stablelm": Family(_DECODER, odd="rotary positions in a part of each head"),
    "starcoder2": Family({**_DECODER, "sliding_window": SLIDING}, odd="biases, sliding windows"),
    "olmo2": Family(_DECODER, odd="norms after attention and FFN"),
    "olmo3": Family({**_DECODER, **_LAYERS}, odd="sliding windows in some blocks"),
    "cohere": Family(_DECODER, tied=True, odd="attention and FFN side by side, scaled logits"),
    "cohere2": Family(
        {**LLAMA, **_LAYERS}, tied=True, odd="sliding windows in some blocks, the others without positions"
    ),
    "granite": Family(
        {**_DECODER, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
        odd="scaled embeddings, residuals and logits",
    ),
    "glm4": Family({**LLAMA, "pad_token_id": 0}, odd="gate and up in one matrix, four norms per block"),
    "smollm3": Family({**_DECODER, "pad_token_id": 0, "no_rope_layers": [1, 0]}, odd="some blocks without positions"),
    "exaone4": Family({**LLAMA, **_LAYERS}, odd="sliding windows in some blocks"),
    "ernie4_5": Family(LLAMA, odd="rotary positions in pairs of neighbours"),
    "helium": Family(LLAMA),
    "nemotron": Family(LLAMA, odd="FFN without a gate, norms with 1 + gain"),
    "hunyuan_v1_dense": Family(LLAMA, odd="norms of queries and keys"),
    "falcon": Family(
        {**_HEADS, "multi_query": True, "new_decoder_architecture": False},
        "transformer.h",
        odd="blocks return tuples, linears of a class of its own",
    ),
    "bloom": Family(
        {"hidden_size": 128, "n_layer": 2, "n_head": 4},
        "transformer.h",
        tied=True,
        odd="blocks return tuples, biases, ALiBi",
    ),
    "mpt": Family(
        {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},
        "transformer.blocks",
        tied=True,
        odd="blocks return tuples, ALiBi",
    ),
    "codegen": Family(
        {**_GPT, "rotary_dim": 16}, "transformer.h", torch.float32, odd="blocks return tuples, q, k, v interleaved"
    ),
    "gpt_bigcode": Family(_GPT, "transformer.h", tied=True, odd="one head of keys and values, biases"),
    "lfm2": Family(
        {**_DECODER, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        tied=True,
        odd="convolutions instead of attention in some blocks",
    ),
    "qwen3_next": Family(
        {**LLAMA, **_DELTA, "num_experts": 0, "mlp_only_layers": [0, 1]}, odd="linear attention in most blocks"
    ),
    "qwen3_5_text": Family({**LLAMA, **_DELTA}, odd="linear attention in most blocks"),
    "falcon_h1": Family(
        {
            **LLAMA,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
        odd="a state space (Mamba 2) beside attention in every block",
    ),
    "mamba2": Family(
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 1,
            "expand": 2,
            "pad_token_id": 0,
        },
        "backbone.layers",
        tied=True,
        odd="a state space in every block, no attention",
    ),
}
MATRIX = {**FAMILIES, **MORE}
"""Every family on which whole runs are tested; FAMILIES are those that finer tests look at, too."""

_EXPERTS = {"num_hidden_layers": 2, "intermediate_size": 128, "num_experts_per_tok": 2}
MIXTURES: dict[str, Family] = {
    "mixtral": Family({**_DECODER, **_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": Family(
        {
            **_DECODER,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        sharded=True,
    ),
    "qwen3_moe": Family({**LLAMA, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 128}, sharded=True),
    "olmoe": Family({**_DECODER, **_EXPERTS, "num_experts": 8}, dtype=torch.float32),
    "granitemoe": Family({**_DECODER, **_EXPERTS, "num_local_experts": 4}, tied=True),
    "deepseek_v3": Family(
        {
            **_DECODER,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 128,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        }
    ),
    "gpt_oss": Family({**LLAMA, **_EXPERTS, "num_local_experts": 4, "sliding_window": SLIDING}),
}


def write(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype | None = None,
    tied: bool | None = None,
    sharded: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a random checkpoint with a tokenizer to `folder` and returns it; what is not given is the family's own."""
    known = {**MATRIX, **MIXTURES}[family]
    config = transformers.AutoConfig.for_model(
        family,
        **{
            **known.settings,
            "vocab_size": VOCABULARY,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": known.tied if tied is None else tied,
            **(settings or {}),
        },
    )
    model = random_model(config).to(known.dtype if dtype is None else dtype)
    return save(model, folder, sharded=known.sharded if sharded is None else sharded)


def random_model(config: transformers.PretrainedConfig) -> nn.Module:
    """A causal language model whose parameters are all random, in float32."""
    return fill(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def fill(model: nn.Module) -> nn.Module:
    """The model with random parameters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise, alpha=0.2)
    return model


def save(model: nn.Module, folder: Path, *, sharded: bool = False) -> Path:
    """Writes the model, the bundled tokenizer and, where no run copies it from, a little of the bundled text."""
    model.save_pretrained(folder, max_shard_size="500KB" if sharded else "1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_LLAMA / name, folder / name)
    for part in ("calibration", "evaluation"):
        rows = itertools.islice(calibration_data.rows("bundled", part), 2)
        path = text(folder, part)
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join((row.text or "")[:2000] for row in rows), encoding="utf-8")
    return folder


def text(model: Path, part: str) -> Path:
    """The text beside a model; a run on it saves the time that reading all of the bundled text takes."""
    return model / ".text" / f"{part}.txt"


def load(folder: Path, **options: Any) -> nn.Module:
    """What any user of transformers would run."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def request(model: Path, out: Path, **changes: Any) -> QuantizeRequest:
    """A run that takes half a second: few windows of the text beside the model."""
    values: dict[str, Any] = {
        "model": str(model),
        "out": out,
        "options": quantize.resolve(changes.get("method", "gptq"), {}),
        "calibration": TextSpec(str(text(model, "calibration")), nsamples=4, seqlen=LENGTH),
        "evaluation": TextSpec(str(text(model, "evaluation")), nsamples=2, seqlen=LENGTH),
        "device": "cpu",
        "dtype": own_dtype(model),
        **changes,
    }
    return QuantizeRequest(**values)


def own_dtype(model: Path) -> str:
    """The precision that transformers loads a model in, as --dtype spells it: on every processor the same results."""
    config = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config["text_config"]["dtype"])


def tokens(windows: int = 2, length: int = LENGTH) -> Tensor:
    """Random token ids [windows, length]."""
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def float32_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [windows, tokens, vocabulary] with the product of the head in float32, whatever the model's precision."""
    hidden, head = model.base_model(input_ids=ids, use_cache=False).last_hidden_state, model.get_output_embeddings()
    logits = hidden.to(head.weight.dtype).float() @ head.weight.float().t()  # as every head gets it
    if head.bias is not None:
        logits += head.bias.float()
    config = model.config.to_dict()
    cap = config.get("final_logit_softcapping")
    logits = logits * (config.get("logit_scale") or 1.0) / config.get("logits_scaling", 1.0)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def read(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, by name."""
    return {name: from_info(checkpoint.read(name), checkpoint.tensors[name]) for name in names}


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Skeleton:
    """The checkpoint's model, by default in its own precision, with everything in place that is not in a block."""
    found = layout(checkpoint)
    made = Skeleton(checkpoint, found, dtype or DTYPES[found.linears[0].dtype], torch.device("cpu"), trust=False)
    made.place_outside(read(checkpoint, found.outside))
    return made


def solved(linear: Linear, scheme: Scheme, form: Format) -> Solved:
    """Random codes, with every one of them in use, and random scales as the format holds them."""
    generator = torch.Generator().manual_seed(linear.rows + scheme.bits)
    shape = (linear.rows, scheme.groups(linear.columns))
    codes = torch.randint(2**scheme.bits, (linear.rows, linear.columns), generator=generator).to(torch.uint8)
    scale = torch.randn(shape, generator=generator).to(DTYPES[form.scale_dtype(linear)]).float()
    if scheme.symmetric:
        return Solved(codes, scale, torch.full(shape, 2.0 ** (scheme.bits - 1)))
    return Solved(codes, scale, torch.randint(2**scheme.bits, shape, generator=generator).float())


def measured(dense: nn.Module, compressed: nn.Module, model: Path) -> dict[str, float]:
    """What a report of `request` should say of two models, worked out afresh on the same text."""
    tokenizer = load_tokenizer(model)
    spec = request(model, model).evaluation
    windows = calibration.load(spec, tokenizer, vocab_size=VOCABULARY, part="evaluation", max_length=LENGTH)
    ids = torch.from_numpy(windows.ids)
    before, after = (float32_logits(each, ids)[:, :-1].double().log_softmax(-1) for each in (dense, compressed))
    nll = [nn.functional.nll_loss(each.flatten(0, 1), ids[:, 1:].flatten()) for each in (before, after)]
    return {
        "dense": float(nll[0].exp()),
        "compressed": float(nll[1].exp()),
        "kl": float((before.exp() * (before - after)).sum(-1).mean()),
        "top1": float((before.argmax(-1) == after.argmax(-1)).double().mean()),
    }


def reported(fidelity: Mapping[str, Any]) -> dict[str, float]:
    """The same figures of a report's `fidelity`."""
    perplexity = fidelity["perplexity"]
    return {
        "dense": perplexity["dense"],
        "compressed": perplexity["compressed"],
        "kl": fidelity["kl"]["mean"],
        "top1": fidelity["agreement"]["top1"],
    }
