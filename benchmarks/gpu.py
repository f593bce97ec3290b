"""Quantizes a random checkpoint of Llama-3-8B's shape with the real command, and says where time and memory went.

    python benchmarks/gpu.py [--device cuda] [--method gptq] [--bits 4] [--keep FOLDER]

16 GB of random bfloat16 weights are written first (not timed), with 128 windows of 2048 random token ids to
calibrate on. Random weights cost what trained ones do: the work depends on shapes only. Prints one JSON object:
seconds per phase, seconds of the whole command, peak device memory and peak resident memory of the process.
--blocks, --hidden, --ffn, --vocabulary and --windows make it smaller.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmpare.compress.checkpoint.tensors import to_bytes
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec

TOKENIZER = Path(__file__).parent.parent / "examples" / "tiny-llama"
HEAD = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint, reused if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        model = folder / "model"
        if not model.exists():
            write_model(model, args)
        text = folder / "windows.jsonl"
        write_windows(text, args)
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "llmpare.cli", "quantize", str(model), "-o", str(out), "--json"]
        command += ["--dataset", str(text), "--nsamples", str(args.windows), "--eval-dataset", str(text)]
        command += ["--eval-nsamples", str(min(8, args.windows)), "--seqlen", str(args.length), "--device", args.device]
        command += ["--method", args.method, "--bits", str(args.bits)]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        report = json.loads(done.stdout)
        if done.returncode:
            sys.exit(json.dumps(report))
        print(json.dumps({"command_seconds": round(seconds, 1), **report["cost"], **report["environment"]}, indent=1))


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A Llama checkpoint of random weights, written tensor by tensor."""
    folder.mkdir(parents=True)
    heads = args.hidden // HEAD
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": args.hidden, "intermediate_size": args.ffn, "num_hidden_layers": args.blocks,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "head_dim": HEAD,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "vocab_size": args.vocabulary, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    hidden, narrow = args.hidden, max(1, heads // 4) * HEAD
    shapes = {"model.embed_tokens.weight": (args.vocabulary, hidden)}
    for block in range(args.blocks):
        at = f"model.layers.{block}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (narrow, hidden),
            f"{at}.self_attn.v_proj.weight": (narrow, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (args.ffn, hidden),
            f"{at}.mlp.up_proj.weight": (args.ffn, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, args.ffn),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (args.vocabulary, hidden)}
    torch.manual_seed(0)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    with CheckpointWriter(folder, specs) as writer:
        for name, shape in shapes.items():
            ones = torch.ones(shape, dtype=torch.bfloat16)
            writer.write(name, to_bytes(ones if len(shape) == 1 else ones.normal_(std=0.02)))


def write_windows(path: Path, args: argparse.Namespace) -> None:
    """Random token ids: no text is needed to cost as much as text."""
    torch.manual_seed(1)
    with path.open("w") as file:
        for ids in torch.randint(2, args.vocabulary, (args.windows, args.length)).tolist():
            file.write(json.dumps({"input_ids": ids}) + "\n")


if __name__ == "__main__":
    main()
