"""Wall time of a fidelity evaluation against the bare forward passes that it needs.

    python benchmarks/evaluate.py DENSE COMPRESSED TEXT [--windows 120] [--length 512] [--runs 3]

Bare passes: both models as transformers loads them, all windows through each, heads included, nothing scored. The
evaluation: `llmpare evaluate`, from reading the checkpoints to the written report. Both in one process and in turn, in
float32. Prints one line of JSON per run, then the medians and their ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from score import load, windows

from llmpare.cli.exits import main as llmpare

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("compressed")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    ids = windows(args.dense, args.text, args.windows, args.length)
    models = [load(args.dense), load(args.compressed)]
    forwards(models, ids[:BATCH])  # decompresses what is packed
    runs = []
    for _ in range(args.runs):
        run = {"bare": seconds(lambda: forwards(models, ids)), **evaluation(args)}
        print(json.dumps({name: round(value, 2) for name, value in run.items()}), flush=True)
        runs.append(run)
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(json.dumps({"median": {name: round(value, 2) for name, value in median.items()},
                      "passes and scores over bare": round((median["forward"] + median["score"]) / median["bare"], 3),
                      "everything over bare": round(median["total"] / median["bare"], 3)}))  # fmt: skip


@torch.no_grad()
def forwards(models: list[torch.nn.Module], ids: torch.Tensor) -> None:
    for model in models:
        for batch in ids.split(BATCH):
            model(input_ids=batch)


def evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of every phase of one evaluation, and in total."""
    with tempfile.TemporaryDirectory() as folder:
        code = llmpare(["evaluate", args.compressed, "--baseline", args.dense, "--text", str(args.text), "--nsamples",
                        str(args.windows), "--seqlen", str(args.length), "--dtype", "float32", "--quiet",
                        "-o", f"{folder}/report"])  # fmt: skip
        assert code == 0, code
        cost = json.loads(Path(f"{folder}/report/report.json").read_bytes())["cost"]
    return {**cost["seconds"], "total": cost["total_seconds"]}


def seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
