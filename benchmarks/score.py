"""Scores checkpoints the way peers are compared: WikiText-2 in windows, float32, KL against the original.

    python benchmarks/score.py DENSE TEXT COMPRESSED... [--windows 120] [--length 512]

TEXT is tokenized whole, with one beginning-of-sequence token in front, and cut into non-overlapping windows; every
token but the first of a window is scored. Models are loaded by plain transformers, so the figure is that of the
file on disk. Prints one line of JSON per checkpoint: perplexity, KL(dense ‖ compressed) in nats per token with its
standard error over windows, and top-1 agreement.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from llmpare.compress.evaluate.fidelity import Scores, score, summarise

BATCH = 4


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("text", type=Path)
    parser.add_argument("compressed", nargs="+")
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    ids = windows(args.dense, args.text, args.windows, args.length)
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32).eval()
    for path in args.compressed:
        model = load(path)
        parts: list[Scores] = []
        for batch in ids.split(BATCH):
            before, after = (m(input_ids=batch).logits[:, :-1].float() for m in (dense, model))
            parts.append(score(before, after, batch[:, 1:]))
        found = summarise(parts, "torch.float32")
        line = {"checkpoint": path, "perplexity": round(found["perplexity"]["compressed"], 3),
                "dense_perplexity": round(found["perplexity"]["dense"], 3), "kl": round(found["kl"]["mean"], 5),
                "kl_stderr": round(found["kl"]["stderr"], 6), "top1": round(found["agreement"]["top1"], 4),
                "tokens": found["tokens"]}  # fmt: skip
        print(json.dumps(line), flush=True)


def windows(model: str, text: Path, count: int, length: int) -> torch.Tensor:
    """[count, length] token ids."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.tensor((bos + ids)[: count * length]).view(-1, length)


def load(path: str) -> torch.nn.Module:
    """The checkpoint in float32, dequantized exactly as its loader does."""
    config = json.loads((Path(path) / "config.json").read_text()).get("quantization_config")
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if config else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra).eval()


if __name__ == "__main__":
    main()
