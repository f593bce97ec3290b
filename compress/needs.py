"""What a run does to keep to its memory, and how much it takes then; no torch.

Every term is the largest amount of that kind that is alive at once. The sum is meant to be an upper bound that is
not far off; tests compare it with what runs really took.
"""

from dataclasses import dataclass, replace

from llmpare.compress import memory
from llmpare.compress.batches import logit_tokens

_IDLE = 0.2  # of what a run takes lies idle between what is in use, if what was freed is kept
_MOST_IDLE = 2**29  # bytes: where more would lie idle, blocks are so large that new memory costs little beside the work


@dataclass(frozen=True)
class Way:
    """What a run does to keep to its memory. It costs time, and not a bit of the output.

    outside: embeddings and head stay loaded from beginning to end; else the head is read a second time. ahead: the next
    block is read while this one is worked on. kept: hidden states stay in the device's memory; else they are spilled.
    together: all windows wait inside a block while its linears are solved; else they pass through it once per input.
    positions: whose logits exist at once, at most. ready: memory that is freed is kept for what comes next in
    the same block; else it is given back to the system at once.
    """

    outside: bool = True
    ahead: bool = True
    kept: bool = True
    together: bool = True
    positions: int = logit_tokens("cuda")
    ready: bool = False

    def lines(self) -> list[str]:
        """What is given up, for people."""
        given = {
            "embeddings and head are loaded only where they are needed": not self.outside,
            "no block is read ahead": not self.ahead,
            "hidden states wait outside of memory": not self.kept,
            "windows pass through a block once per input": not self.together,
        }
        return [line for line, holds in given.items() if holds]


# From what costs least time to what costs most, each with all before it.
_WAYS = (
    Way(),
    Way(outside=False),
    Way(outside=False, ahead=False),
    Way(outside=False, ahead=False, kept=False),
    Way(outside=False, ahead=False, kept=False, together=False),
)


@dataclass(frozen=True)
class Needs:
    """Bytes by kind.

    outside: embeddings, head and the like, of which `head` is all that scoring needs. entering: the first block, as it
    is loaded. block: the one that is worked on, with what becomes of it. following: the next one, as it is read.
    statistics, solving: of its linears. forward_per_token: of the windows that pass through a block at once.
    waiting_per_token: activations that every calibration token costs if all windows wait inside a block.
    stream_per_token: hidden states of every calibration token. watched: hidden states of the evaluation text, and what
    else stays from beginning to end. logits_per_position: of both models, and their scores. tokens: of the calibration
    text. at_once: tokens that pass through a block at once. frugal: whether the run can do without parts of the model,
    and without hidden states, for a time.
    """

    process: int
    outside: int
    head: int
    entering: int
    block: int
    following: int
    statistics: int
    solving: int
    forward_per_token: int
    stream_per_token: int
    waiting_per_token: int
    watched: int
    logits_per_position: int
    tokens: int
    at_once: int
    frugal: bool = True
    device: str = "cpu"
    way: Way = Way()

    @property
    def memory(self) -> int:
        """The peak, in bytes."""
        return self._at(self.way)

    @property
    def least(self) -> int:
        """The peak with everything given up that can be."""
        return min(self._at(way) for way in self._ways())

    @property
    def sequential(self) -> bool:
        """Whether linears of a block are solved one after the other, each seeing what became of those before."""
        return self.waiting_per_token * self.tokens > 0

    @property
    def spilled(self) -> int:
        """Bytes of hidden states that wait outside of memory."""
        return 0 if self.way.kept else self._streams

    def within(self, room: int) -> "Needs":
        """The quickest way to do with `room` bytes; if there is none, the one that needs least."""
        ways = self._ways()
        found = replace(self, way=next((way for way in ways if self._at(way) <= room), min(ways, key=self._at)))
        ready = replace(found, way=replace(found.way, ready=True))
        pays = ready.memory <= room and ready.memory - found.memory <= _MOST_IDLE
        return ready if pays else found

    def explain(self) -> str:
        """The parts, for people."""
        way = self.way
        parts = {
            "process": self.process,
            "weights": (self.outside if way.outside else 0) + self.block + (self.following if way.ahead else 0),
            "solver": self.statistics + self.solving,
            "activations": self._held(way) + max(self._waiting(way), self._passing),
            "kept for reuse": self.memory - self._at(replace(way, ready=False)),
        }
        return ", ".join(f"{name} {memory.show(size)}" for name, size in parts.items() if size)

    def _ways(self) -> list[Way]:
        most, ways = logit_tokens(self.device), _WAYS if self.frugal else (Way(), Way(together=False))
        return [replace(way, positions=most >> halvings) for way in ways for halvings in range(5)]

    def _at(self, way: Way) -> int:
        streams = self._held(way)
        rest = max(0, self.outside - 2 * self.head)  # what is neither embeddings nor head stays where it is
        outside, following = self.outside if way.outside else rest, self.following if way.ahead else 0
        entering = self.outside + self.entering
        working = (
            outside + following + self.block + max(self.statistics + self.solving + self._waiting(way), self._forward)
        )
        scoring = (self.outside if way.outside else self.head + rest) + self.logits_per_position * min(
            way.positions, logit_tokens(self.device)
        )
        peak = streams + max(entering, working, scoring)
        return self.process + peak + (int(peak * _IDLE) if way.ready else 0)

    @property
    def _streams(self) -> int:
        return self.watched + self.stream_per_token * self.tokens

    def _waiting(self, way: Way) -> int:
        return self.waiting_per_token * (self.tokens if way.together else 0)

    def _held(self, way: Way) -> int:
        """Hidden states in memory; if they are spilled, of one batch of two streams, and of what becomes of it."""
        return self._streams if way.kept else min(self._streams, 3 * self.stream_per_token * self.at_once)

    @property
    def _passing(self) -> int:
        return self.forward_per_token * self.at_once

    @property
    def _forward(self) -> int:
        return self.statistics + self._passing
