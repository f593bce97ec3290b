"""What an evaluation is asked to do. Contradictions that show without opening a file are refused here."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmpare.compress.errors import UsageError
from llmpare.compress.request import BUNDLED, Gates

TOP_K = 64  # log-probabilities a saved baseline keeps per position
TOP = 5  # most likely tokens of either model that are compared
AGAINST_BASELINE = ("max_kl", "max_perplexity_increase", "min_agreement", "min_recovery")


@dataclass(frozen=True)
class TextRequest:
    """Which text to measure on. nsamples: the first N windows, None all. seqlen: None is 2048 or the model's limit."""

    datasets: tuple[str, ...] = (BUNDLED,)
    nsamples: int | None = None
    seqlen: int | None = None


@dataclass(frozen=True)
class TasksRequest:
    """Tasks, groups or tags of the lm-eval library, or of include: a folder with tasks as YAML, or one such file, whose
    paths are relative to it. limit: the first documents of each task only. num_fewshot: examples in front of a
    question, None as each task has it. batch_size: sequences at a time.
    """

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    include: Path | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class SpeedRequest:
    """What to time. batch_sizes: None tries 1, 2, 4, … until memory ends. Lengths in tokens.

    variations: of the plain run, one at a time (speed.cases.VARIATIONS); None takes those that the engine can run.
    """

    engines: tuple[str, ...] = ("transformers",)
    batch_sizes: tuple[int, ...] | None = None
    prompt_lengths: tuple[int, ...] = (128, 512)
    variations: tuple[str, ...] | None = None
    new_tokens: int = 32
    repeats: int = 5


@dataclass(frozen=True)
class EvaluateRequest:
    """Everything `llmpare evaluate` needs to know. baseline: a model, or a folder made by save_baseline."""

    models: tuple[str, ...]
    baseline: str | None = None
    out: Path | None = None
    text: TextRequest = field(default_factory=TextRequest)
    save_baseline: Path | None = None
    top_k: int = TOP_K
    tasks: TasksRequest | None = None
    speed: SpeedRequest | None = None
    gates: Gates = field(default_factory=Gates)
    junit: Path | None = None
    against: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None  # bytes
    revision: str | None = None
    trust_remote_code: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("there is no model to evaluate", "name at least one: llmpare evaluate MODEL")
        gates = asdict(self.gates)
        for name in AGAINST_BASELINE:
            if self.baseline is None and gates[name] is not None:
                raise UsageError(f"{_flag(name)} compares with a baseline", "name the original model with --baseline")
        if self.gates.min_recovery is not None and self.tasks is None:
            raise UsageError("--min-recovery needs scores of tasks", "name them with --tasks")
        if self.gates.min_tokens_per_second is not None and self.speed is None:
            raise UsageError("--min-tokens-per-second needs a measurement of speed", "add --speed")
        if self.top_k < TOP:
            raise UsageError(f"--top-k {self.top_k}: the {TOP} most likely tokens are compared", f"use at least {TOP}")
        if self.save_baseline is not None and self.baseline is None and len(self.models) > 1:
            raise UsageError("--save-baseline: which of the models is the baseline?", "name it with --baseline")

    def spec(self) -> dict[str, Any]:
        """The request as plain JSON values."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))  # str: of paths
        return fields


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
