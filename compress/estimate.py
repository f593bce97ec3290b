"""How much memory a run takes at its peak, predicted from shapes; no torch.

Every term is the largest amount of that kind that is alive at once. The sum is meant to be an upper bound that is
not far off; tests compare it with what runs really took.
"""

import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmpare.compress import memory, quantize
from llmpare.compress.calibration import DEFAULT_WINDOWS
from llmpare.compress.checkpoint.header import TensorInfo, tensor_bytes
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.hardware import torch_for_gpus
from llmpare.compress.model.layout import Layout, Linear, decoder_config, find
from llmpare.compress.request import NO_TEXT, QuantizeRequest, RunRequest, Scheme

_PROCESS = 480 * 2**20  # an interpreter with torch and transformers imported
_CUDA_BUILD = 360 * 2**20  # what the libraries of a torch for GPUs take beyond that, on whatever device a run works
_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # enough to keep the device busy, little enough to stay small
_LOGIT_TOKENS = {"cpu": 512, "cuda": 4096}
_GRAMS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}  # numbers in the statistics of experts that are solved together


# Measured, and rounded up. What a solver holds at its peak, in float32: copies of the weights, of their Gram matrix,
# and of those rows of the weights that it takes at once.
_COPIES = {"rtn:solve_alike": (3, 0, 0), "gptq:solve_alike": (1.3, 1, 9)}
_IDLE = 0.4  # of what a run takes lies idle between what is in use, if what was freed is kept
_MOST_IDLE = 2**29  # bytes: where more would lie idle, blocks are so large that new memory costs little beside the work
_ROWS_OF = 1 << 23  # weights that are taken at once on the CPU, by the solver and to measure errors
_TUNED_WEIGHT = 48  # bytes: the weight, its place, offset, gradients and the two moments of Adam
_TUNED_OUTPUTS = 7  # what automatic differentiation keeps, in units of what the linears put out


def process() -> int:
    """Bytes that any run of this installation takes, with torch and transformers imported; imports neither."""
    return _PROCESS + (_CUDA_BUILD if torch_for_gpus() else 0)


def batch_tokens(device: str) -> int:
    """Tokens that pass through a block at once."""
    return _BATCH_TOKENS.get(device, _BATCH_TOKENS["cpu"])


def experts_at_once(columns: int, device: str) -> int:
    """Experts whose linears, with so many inputs, are solved in one loop."""
    return max(1, _GRAMS_AT_ONCE.get(device, _GRAMS_AT_ONCE["cpu"]) // columns**2)


def logit_tokens(device: str) -> int:
    """Positions whose logits exist at once."""
    return _LOGIT_TOKENS.get(device, _LOGIT_TOKENS["cpu"])


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
    positions: int = _LOGIT_TOKENS["cuda"]
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
    else stays from beginning to end. logits_per_position: of both models, and their scores. frugal: whether the
    run can do without parts of the model, and without hidden states, for a time.
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
    batch: int
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
            "activations": self._held(way) + max(self._waiting(way), self.forward_per_token * self._at_once),
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
        return self._streams if way.kept else min(self._streams, 3 * self.stream_per_token * self._at_once)

    @property
    def _at_once(self) -> int:
        return min(self.batch, batch_tokens(self.device))

    @property
    def _forward(self) -> int:
        return self.statistics + self.forward_per_token * self._at_once


@dataclass(frozen=True)
class Work:
    """What a treatment of blocks holds at its peak.

    weights, grams, rows: float32 copies of the matrix that is being solved, of its Gram matrix, and of the rows that
    are taken at once. blocks: copies of a block. linears: those that are treated; None: all. tunes: trains whole
    blocks. dense_too: follows the calibration text through the original model as well. twin: the output is a model of
    its own, with other shapes. followed: tokens whose hidden states a survey holds.
    """

    weights: float
    grams: int
    rows: int = 0
    blocks: float = 2
    linears: frozenset[Linear] | None = None
    tunes: bool = False
    dense_too: bool = False
    twin: bool = False
    followed: int = 0


def needs(
    checkpoint: Checkpoint,
    layout: Layout,
    schemes: Mapping[Linear, Scheme | None],
    request: QuantizeRequest,
    *,
    dtype: str,
    seqlen: int,
    device: str = "cpu",
) -> Needs:
    """What quantizing this checkpoint takes: see needs_of."""
    method = quantize.find(request.method)
    tunes = method.tuner is not None
    correction = bool(dict(request.options).get("correction"))
    work = Work(
        *_COPIES[method.solver],
        blocks=2 if tunes else 1.15,  # weights make room for what becomes of them, unless they are needed again
        linears=frozenset(linear for linear, scheme in schemes.items() if scheme is not None),
        tunes=tunes,
        dense_too=tunes or correction,
    )
    return needs_of(checkpoint, layout, request, work, dtype=dtype, seqlen=seqlen, device=device)


def needs_of(
    checkpoint: Checkpoint,
    layout: Layout,
    request: RunRequest,
    work: Work,
    *,
    dtype: str,
    seqlen: int,
    device: str = "cpu",
) -> Needs:
    """What a run takes that treats blocks in this way.

    dtype: of the forward passes. seqlen: tokens per window. device: the kind of it.
    """
    size = tensor_bytes(dtype, (1,))
    tensors = checkpoint.tensors
    config = decoder_config(checkpoint.config)
    hidden = find(config, "hidden_size", "n_embd", "d_model", default=min(n.columns for n in layout.linears))
    vocabulary = find(config, "vocab_size", default=0)
    narrow = {n for n in layout.outside if tensors[n].shape[:1] == (vocabulary,)}
    narrow |= {linear.weight for linear in layout.linears if linear.expert is None}
    narrow &= tensors.keys() if device == "cpu" and dtype == "F32" else set()  # kept as they are stored: see Skeleton
    sizes = {n: tensors[n].nbytes if n in narrow else _loaded(tensors[n], size) for n in tensors}
    loaded = [sum(sizes[name] for name in block) for block in layout.blocks]
    blocks = [sum(max(sizes[n], tensors[n].numel * size) for n in block) for block in layout.blocks]
    treated = [[n for n in layout.of_block(i) if work.linears is None or n in work.linears] for i in range(len(blocks))]
    stacks = [each for linears in treated if (each := _stacks(linears, device))]
    text = request.calibration.dataset != NO_TEXT
    windows = (request.calibration.nsamples or DEFAULT_WINDOWS["calibration"]) if text else 0
    scored = request.evaluation.nsamples or DEFAULT_WINDOWS["evaluation"]
    routed = find(config, "num_experts_per_tok", "num_experts_per_token", default=1)
    of_block = [layout.of_block(index) for index in range(len(blocks))]
    columns = max(_waiting(linears, routed, hidden) for linears in of_block)
    rows = max(linear.rows * (1 if linear.expert is None else routed) for linear in layout.linears)
    both = 2 if work.dense_too else 1
    grams = max((count * columns**2 for found in stacks for _, columns, count in found), default=0)
    if work.dense_too:  # of all inputs at once
        grams = 2 * max((sum(columns**2 for _, columns, _ in found) for found in stacks), default=0)
    models = 2 if work.twin else 1
    found = Needs(
        process=process(),
        outside=sum(sizes[name] for name in layout.outside) * models,
        entering=max(loaded) * models,
        head=max((sizes[name] for name in layout.outside), default=0),
        # experts are copied into their place, and what becomes of them waits until all of a block are done
        block=int(max(blocks) * (work.blocks + (2 if layout.experts else 0))) * models,
        following=max(sum(tensors[name].nbytes for name in block) for block in layout.blocks),
        # and of all experts of a mixture together
        statistics=4 * (grams + max((n.columns**2 for n in layout.experts), default=0)) if text else 0,
        solving=max(
            max((_solving(*stack, work, text) for found in stacks for stack in found), default=0),
            _tuning(treated, min(batch_tokens("cpu"), windows * seqlen) * size) if work.tunes else 0,
        ),
        # the widest of the linears, thrice, beside the residual stream, and in float32 for its statistics
        forward_per_token=(3 * rows + 6 * hidden) * size + seqlen * 4 + (4 * columns if text else 0),
        stream_per_token=hidden * size * both,
        waiting_per_token=0 if work.dense_too else size * (columns + 2 * hidden),
        watched=(2 * scored * seqlen + work.followed) * hidden * size,
        logits_per_position=5 * vocabulary * 4,
        tokens=windows * seqlen,
        batch=max(windows, scored) * seqlen,
        frugal=not work.twin and not work.followed,
        device=device,
    )
    return found.within(sys.maxsize if request.max_memory is None else request.max_memory)


def _loaded(info: TensorInfo, size: int) -> int:
    """Bytes of a tensor as it is on disk and as it is worked with, which is the same memory if nothing is converted."""
    return info.nbytes if info.nbytes == info.numel * size else info.nbytes + info.numel * size


def _stacks(linears: Sequence[Linear], device: str) -> list[tuple[int, int, int]]:
    """(rows, columns, count) of the matrices that a block's linears are solved as, `count` of them in one loop.

    All that read the same input are one matrix.
    """
    rows: dict[tuple[str, int, bool], int] = defaultdict(int)
    for linear in linears:
        rows[linear.name.rpartition(".")[0], linear.columns, linear.expert is not None] += linear.rows
    alike = Counter((total, columns) for (_, columns, expert), total in rows.items() if expert)
    return [
        (total, columns, min(alike[total, columns], experts_at_once(columns, device)) if expert else 1)
        for (_, columns, expert), total in rows.items()
    ]


def _waiting(linears: Sequence[Linear], routed: int, hidden: int) -> int:
    """The widest input of a linear in a block, per token; experts' own are what `routed` of them made of it."""
    widest = max(linear.columns for linear in linears)
    inner = [linear.columns for linear in linears if linear.expert is not None and linear.rows == hidden]
    return max(widest, routed * max(inner, default=0))


def _solving(rows: int, columns: int, count: int, work: Work, text: bool) -> int:
    """Bytes that solving `count` matrices in one loop takes at its peak."""
    weights = count * rows * columns
    at_once = work.rows * min(weights, max(_ROWS_OF, columns))
    copies = work.grams + (2 if count > 1 and work.grams else 0)  # what is solved together lies in one piece
    return 4 * (int(work.weights * weights) + at_once + (copies * count * columns**2 if text else 0))


def _tuning(of_block: Sequence[Sequence[Linear]], bytes_: int) -> int:
    """Bytes that tuning a block takes. bytes_: those of one number for every token of one step."""
    weights = max(sum(linear.rows * linear.columns for linear in linears) for linears in of_block)
    outputs = max(sum(linear.rows for linear in linears) for linears in of_block)
    return _TUNED_WEIGHT * weights + _TUNED_OUTPUTS * outputs * bytes_


def disk_free(out: Path) -> int:
    """Bytes free where `out` will be, in the nearest folder that exists."""
    place = Path(os.path.abspath(out))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
