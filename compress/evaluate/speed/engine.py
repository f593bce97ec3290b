"""What an engine is to the measurement: something that holds a model and can be asked for tokens.

An adapter is one file in `engines` with a function `load(Job) -> Engine`, and one line in the registry there. It runs
in a process of its own (worker.py), so it may print, keep threads or die; it catches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llmpare.compress.report import show

Memory = Literal["device", "resident"]
OWN = "its own"  # attention: whatever the engine or the model's code runs with by itself


@dataclass(frozen=True)
class Case:
    """One way to run the model: how much at once, and with which of the engine's settings.

    batch: sequences at once, or requests if continuous. prompt: tokens of each, at most that many if continuous.
    new_tokens: generated per sequence, at least 2: the first belongs to the prompt, the others are decoded.
    cache: 'dynamic' grows with the context, 'static' is allocated whole, 'off' computes everything again for each
    token, 'paged' is kept in blocks. compiled: whether the decode step is. attention: the implementation.
    continuous: requests of mixed lengths that come and go, instead of one batch. growing: one of a series of batch
    sizes that ends where memory or time does.
    """

    batch: int
    prompt: int
    new_tokens: int
    cache: str = "dynamic"
    compiled: bool = False
    attention: str = OWN
    continuous: bool = False
    growing: bool = False

    @property
    def label(self) -> str:
        """For messages: 'batch 4, prompt 128, static cache, compiled, sdpa attention'."""
        size = f"{self.batch} requests at once" if self.continuous else f"batch {self.batch}"
        return f"{size}, prompt {self.prompt}, {show.setting(vars(self))}"


@dataclass(frozen=True)
class Job:
    """What a worker is to do: a checkpoint, how to hold it, and the cases in order. device, dtype: torch's names."""

    engine: str
    model: Path
    device: str
    dtype: str
    trust: bool
    cases: tuple[Case, ...]
    repeats: int
    max_memory: int | None  # bytes
    seconds: float  # after which no larger batch of a growing series begins


@dataclass(frozen=True)
class Work:
    """What a model has to move and to compute, as far as the engine can tell; the roofline is made of it.

    weight_bytes: all weights as the engine holds them. read_bytes: those of them that every forward reads, which is
    all but an input embedding of its own. body, head: multiply-adds per token in the blocks and in the output head.
    kv_bytes: keys and values per token of context. attention: multiply-adds per token and token of its context.
    None: not known, or not a fixed number (mixtures of experts read what they route to).
    """

    weight_bytes: int
    read_bytes: int | None = None
    body: int | None = None
    head: int | None = None
    kv_bytes: int | None = None
    attention: int | None = None


@dataclass(frozen=True)
class Run:
    """One generation. seconds: to the first tokens, then of each decode step or, where an engine does not tell them
    apart, the mean of them. decode: seconds of all decode steps. tokens: generated ids [batch][new_tokens].
    """

    first: float
    steps: Sequence[float]
    decode: float
    tokens: Sequence[Sequence[int]]


class Engine(Protocol):
    """An engine that holds a model.

    weights: 'as stored', or what was done to them before they were timed. attention: what a case with attention OWN
    runs with. vocabulary: ids that prompts may hold. longest: tokens of context that the model allows. memory: which
    memory `peak_bytes` is of; None where the engine takes all there is in advance, so that a peak says nothing.
    """

    work: Work
    weights: str
    attention: str
    vocabulary: Sequence[int]
    longest: int
    memory: Memory | None

    def refuses(self, case: Case) -> str:
        """Why it cannot run a case, before anything is tried; '' if it may be able to."""
        ...

    def generate(self, case: Case, prompts: Sequence[Sequence[int]]) -> Run:
        """Greedy continuation of prompts of equal length, past any end-of-sequence token.

        Of a continuous case, which only engines that list the variation are asked for: prompts of mixed lengths, and
        all the time counts as `decode`.
        """
        ...

    def release(self) -> None:
        """Gives back what the last case held: caches, compiled code."""
        ...
