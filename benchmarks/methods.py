"""What each method and option loses and costs, as a Markdown table.

    python benchmarks/methods.py DENSE CALIBRATION TEXT [--bits 4 3 2]

Runs the real command for every row, scores the checkpoint it wrote as score.py does, and prints KL(dense ‖
compressed), perplexity, agreement, and the seconds of the phases that make the checkpoint: what peers count when they
time the compression call alone. "All" is the whole command: imports, text, report and verification included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {
    "rtn, no text": "--method rtn --dataset none",
    "rtn": "--method rtn",
    "gptq, no refinement": "--rounds 0",
    "gptq (default)": "",
    "gptq, 3 rounds": "--rounds 3",
    "gptq, correction 0.5": "--correction 0.5",
    "gptq, correction 1": "--correction 1",
    "tuned, 20 steps": "--best --steps 20",
    "tuned (--best)": "--best",
    "tuned, correction 0.5": "--best --correction 0.5",
}
COMPRESSION = ("calibrate", "solve", "tune", "advance", "pack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    for bits in args.bits:
        print(f"\n| W{bits} group 128 | KL | perplexity | top-1 | compression s | all s | peak MB |", flush=True)
        print("|---|---|---|---|---|---|---|")
        for name in args.rows:
            print(row(name, bits, args), flush=True)


def row(name: str, bits: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "llmpare.cli", "quantize", args.dense, "-o", str(out), "--bits", str(bits)]
        command += ([] if "--dataset" in ROWS[name] else ["--dataset", args.calibration]) + ROWS[name].split()
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        cost = json.loads((out / "report.json").read_text())["cost"]
        scored = [sys.executable, str(HERE / "score.py"), args.dense, args.text, str(out)]
        score = json.loads(subprocess.run(scored, check=True, capture_output=True, text=True).stdout)
    spent = sum(cost["seconds"].get(phase, 0.0) for phase in COMPRESSION)
    return (
        f"| {name} | {score['kl']:.5f} | {score['perplexity']:.2f} | {score['top1']:.1%} | {spent:.1f} "
        f"| {seconds:.1f} | {cost['peak_rss_bytes'] / 2**20:.0f} |"
    )


if __name__ == "__main__":
    main()
