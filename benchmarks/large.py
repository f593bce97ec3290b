"""Quantizes a random checkpoint of Llama-3-8B's shape in less memory than its weights take, and says what it took.

    python benchmarks/large.py FOLDER [--method rtn|gptq] [--blocks 32] [--memory 4GB] [--windows 16] [--length 512]
        [--dtype auto] [FLAG…]

16 GB of random bfloat16 weights are written to FOLDER first, unless they are there, and 5 GB of output go beside them.
Prints one JSON object: predicted and measured peak memory, seconds per phase, bytes of weights read and written, the
source's and the output's size. --blocks makes the model shorter; blocks are alike, so time grows with their number and
memory does not. Any other flag goes to `llmpare quantize`, as `--rounds 0` for GPTQ without refinement.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="rtn", choices=("rtn", "gptq"))
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    args, others = parser.parse_known_args()
    args.hidden, args.ffn, args.vocabulary = 4096, 14336, 128256
    model, text = args.folder / f"model-{args.blocks}", args.folder / "windows.jsonl"
    if not model.exists():
        gpu.write_model(model, args)
    gpu.write_windows(text, args)
    command = [sys.executable, "-m", "llmpare.cli", "quantize", str(model), "-o", str(args.folder / args.method)]
    command += ["--method", args.method, "--seqlen", str(args.length), "--max-memory", args.memory]
    command += ["--device", "cpu", "--dtype", args.dtype]
    command += ["--dataset", str(text) if args.method == "gptq" else "none", "--nsamples", str(args.windows)]
    command += ["--eval-dataset", str(text), "--eval-nsamples", "2", "--json", "--force", *others]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    report = json.loads(done.stdout)
    if done.returncode:
        sys.exit(json.dumps(report))
    sizes = {"source_bytes": report["source"]["bytes"], "output_bytes": report["size"]["output_bytes"]}
    print(json.dumps({"command_seconds": round(time.perf_counter() - start, 1), **report["cost"], **sizes}, indent=1))


if __name__ == "__main__":
    main()
