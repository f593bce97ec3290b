"""A checkpoint several times larger than the memory that the process is allowed is compressed all the same."""

import json
import shutil
from pathlib import Path

import tiny
import torch

from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec

MIB = 2**20
LIMIT = 320 * MIB  # of memory that is private to the process, touched or not, beyond what imports reserve
BLOCKS, HIDDEN, INNER = 70, 1024, 4096
SHAPES = {
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def large_llama(folder: Path) -> int:
    """Writes a Llama whose blocks all hold the same random weights, one tensor at a time. Returns its bytes."""
    folder.mkdir()
    config = tiny.config(
        blocks=BLOCKS, tied=True, dtype="bfloat16", hidden_size=HIDDEN, intermediate_size=INNER,
        num_attention_heads=8, num_key_value_heads=2, head_dim=HIDDEN // 8,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, folder / name)
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (tiny.VOCABULARY, HIDDEN))]
    for index in range(BLOCKS):
        specs += [TensorSpec(f"model.layers.{index}.{n}.weight", "BF16", shape) for n, shape in SHAPES.items()]
    specs.append(TensorSpec("model.norm.weight", "BF16", (HIDDEN,)))
    made = {spec.shape: weights(spec.shape) for spec in specs}
    with CheckpointWriter(folder, specs) as writer:
        for spec in specs:
            writer.write(spec.name, made[spec.shape])
        writer.sync()
    return sum(spec.nbytes for spec in specs)


def weights(shape: tuple[int, ...]) -> bytes:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = 1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
    return values.bfloat16().view(torch.uint8).numpy().tobytes()


def test_a_model_several_times_larger_than_memory(tmp_path: Path) -> None:
    size = large_llama(tmp_path / "model")
    assert size > 6 * LIMIT
    command = [
        "quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--json",
        "--method", "rtn", "--dataset", "none", "--eval-nsamples", "1", "--seqlen", "32",
        "--ignore", "mlp|[qkv]_proj",  # their search takes time, and no memory that o_proj's does not
    ]  # fmt: skip
    done = tiny.limited(command, LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report["blocks"]) == BLOCKS
    assert report["size"]["output_bytes"] > 6 * LIMIT  # what was not compressed went through as well
    shutil.rmtree(tmp_path)  # gigabytes that no later test should have to share the disk with
