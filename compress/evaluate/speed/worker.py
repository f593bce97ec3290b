"""One engine in a process of its own: whatever it does to itself, the measurement goes on.

`python -m llmpare.compress.evaluate.speed.worker FD` reads a job as JSON from standard input and writes one JSON
object per line to the pipe FD: {"loaded"}, then {"begin"} and {"done"} or {"skip"} for each case, or {"error"} and
the end. An engine's own output goes to standard output and error, which the parent keeps for the case of a crash.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from llmpare.compress import devices, memory
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.speed import engines, prompts
from llmpare.compress.evaluate.speed.engine import Case, Engine, Job, Run
from llmpare.compress.evaluate.speed.growth import Growth

WARMUP = 1  # runs before those that count
WARMUP_COMPILED = 3  # compiling, warming up and recording the graph of CUDA


def main() -> None:
    """The process. Its one argument is the number of the pipe."""
    pipe = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _tell(pipe, error=": ".join([kind.__name__, *lines[:1]]))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain
    fields = json.load(sys.stdin)
    cases = tuple(Case(**case) for case in fields.pop("cases"))
    Worker(Job(**{**fields, "model": Path(fields["model"])}, cases=cases), pipe).run()


def _tell(pipe: TextIO, **message: Any) -> None:
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


class Worker:
    """Runs the cases of a job one after the other."""

    def __init__(self, job: Job, pipe: TextIO) -> None:
        self.job, self.pipe = job, pipe
        self.device = torch.device(job.device)

    def run(self) -> None:
        adapter = importlib.import_module(engines.ENGINES[self.job.engine].module)
        if self.device.type == "cuda" and self.job.max_memory is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.job.max_memory / total), self.device)
        self.before = memory.resident()
        self.engine: Engine = adapter.load(self.job)
        # CUDA says itself when it is full; on the CPU the kernel would end some process, and perhaps not this one.
        room = (self.job.max_memory or devices.room(self.device)) if self.device.type == "cpu" else None
        self.growth = Growth(memory.resident(), room, self.job.seconds)
        _tell(
            self.pipe,
            loaded={
                "work": asdict(self.engine.work),
                "weights": self.engine.weights,
                "attention": self.engine.attention,
            },
        )
        for index, case in enumerate(self.job.cases):
            if case.growing and self.growth.ended:
                continue
            if reason := self._refusal(case):
                self.growth.ended |= case.growing
                _tell(self.pipe, skip=index, why=reason)
                continue
            _tell(self.pipe, begin=index)
            start = time.perf_counter()
            try:
                sample = self._sample(case)
            except torch.OutOfMemoryError:
                sample = None
            self._forget()
            if sample is None:
                self.growth.ended |= case.growing
                _tell(self.pipe, skip=index, why="the device ran out of memory")
                continue
            _tell(self.pipe, done=index, **asdict(sample))
            spent = time.perf_counter() - start
            if case.growing or index == 0:
                self.growth.record(case.batch, memory.peak_resident(), spent, counts=case.growing)

    def _refusal(self, case: Case) -> str:
        """Why a case is not worth beginning, or ''."""
        longest = self.engine.longest
        if case.prompt + case.new_tokens > longest:
            return f"{case.prompt} + {case.new_tokens} tokens are more than the {longest} the model allows"
        if case.growing and (reason := self.growth.refuses(case.batch)):
            return reason
        return self.engine.refuses(case)

    def _sample(self, case: Case) -> "Sample":
        if case.continuous:
            texts = prompts.mixed(self.engine.vocabulary, case.batch, case.prompt)
        else:
            texts = prompts.equal(self.engine.vocabulary, case.batch, case.prompt)
        warmup = WARMUP_COMPILED if case.compiled else WARMUP
        for _ in range(warmup):
            _check(case, self.engine.generate(case, texts))
        self._lower_water()
        runs = [self.engine.generate(case, texts) for _ in range(self.job.repeats)]
        for run in runs:
            _check(case, run)
        return Sample(
            first=[run.first for run in runs],
            steps=[second for run in runs for second in run.steps],
            decode=[run.decode for run in runs],
            prompt_tokens=sum(len(text) for text in texts),
            new_tokens=sum(len(tokens) for tokens in runs[0].tokens),
            peak_bytes=self._peak(),
            memory=self.engine.memory,
            warmup=warmup,
        )

    def _peak(self) -> int | None:
        if self.engine.memory == "device":
            return devices.peak(self.device)
        return memory.peak_resident() - self.before if self.engine.memory == "resident" else None

    def _lower_water(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        memory.forget_peak()

    def _forget(self) -> None:
        self.engine.release()
        devices.release()


@dataclass(frozen=True)
class Sample:
    """What one case came to. Seconds by run: first, decode; by step of any run: steps. Tokens of one run."""

    first: Sequence[float]
    steps: Sequence[float]
    decode: Sequence[float]
    prompt_tokens: int
    new_tokens: int
    peak_bytes: int | None
    memory: str | None
    warmup: int


def _check(case: Case, run: Run) -> None:
    """Every sequence must have all its tokens, or the throughput would be of another case."""
    if len(run.tokens) != case.batch or any(len(tokens) != case.new_tokens for tokens in run.tokens):
        counts = sorted({len(tokens) for tokens in run.tokens})
        raise InputError(
            f"asked for {case.batch} × {case.new_tokens} tokens, got {len(run.tokens)} sequences of {counts}"
        )


if __name__ == "__main__":
    main()
