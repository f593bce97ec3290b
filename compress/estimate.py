"""How much memory a run takes at its peak, predicted from shapes; no torch.

Every term is the largest amount of that kind that is alive at once. The sum is meant to be an upper bound that is
not far off; tests compare it with what runs really took.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmpare.compress import memory, quantize
from llmpare.compress.calibration import DEFAULT_WINDOWS
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.model.layout import Layout, Linear, decoder_config, find
from llmpare.compress.request import NO_TEXT, QuantizeRequest, RunRequest, Scheme

PROCESS = 480 * 2**20  # an interpreter with torch and transformers imported
SEQUENTIAL = 16 * 2**30  # bytes of activations that may wait inside a block for its linears to be solved
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # enough to keep the device busy, little enough to stay in its cache
_LOGIT_TOKENS = {"cpu": 512, "cuda": 4096}


# Measured, and rounded up. Copies in float32 that a solver holds at its peak: of the weights, of their Gram matrix.
_COPIES = {"rtn:solve": (5, 1), "gptq:solve": (12, 8)}
_TUNED_WEIGHT = 48  # bytes: the weight, its place, offset, gradients and the two moments of Adam
_TUNED_OUTPUTS = 7  # what automatic differentiation keeps, in units of what the linears put out


def batch_tokens(device: str) -> int:
    """Tokens that pass through a block at once."""
    return _BATCH_TOKENS.get(device, _BATCH_TOKENS["cpu"])


def logit_tokens(device: str) -> int:
    """Positions whose logits exist at once."""
    return _LOGIT_TOKENS.get(device, _LOGIT_TOKENS["cpu"])


@dataclass(frozen=True)
class Needs:
    """Bytes by kind.

    apart: statistics besides, if windows do not pass through a block together: those of all experts at once.
    stream_per_token: activations that every calibration token costs for the whole run. waiting_per_token: those it
    costs besides if all windows pass through a block together, which they do up to waiting_limit.
    """

    process: int
    weights: int
    statistics: int
    solving: int
    forward: int
    evaluation: int
    stream_per_token: int
    waiting_per_token: int
    tokens: int
    waiting_limit: int = SEQUENTIAL
    apart: int = 0

    @property
    def memory(self) -> int:
        """The peak, in bytes."""
        learned = self.statistics + (0 if self.sequential else self.apart)
        fixed = self.process + self.weights + max(learned + self.solving, self.forward) + self.evaluation
        return fixed + self._per_token * self.tokens

    @property
    def sequential(self) -> bool:
        """Whether the windows pass through a block together: one forward instead of two, if that is not too much."""
        return 0 < self.waiting_per_token * self.tokens <= self.waiting_limit

    @property
    def _per_token(self) -> int:
        return self.stream_per_token + (self.waiting_per_token if self.sequential else 0)

    def largest_sample(self, room: int, seqlen: int) -> int:
        """The most windows of `seqlen` tokens with which `room` bytes are enough; 0 if none are."""
        if not self.tokens:
            return 0
        left = max(0, room - (self.memory - self._per_token * self.tokens))
        apart = left // (self.stream_per_token * seqlen)
        if not replace(self, tokens=apart * seqlen).sequential:
            return apart
        return left // ((self.stream_per_token + self.waiting_per_token) * seqlen)

    def explain(self) -> str:
        """The parts, for people."""
        parts = {
            "process": self.process,
            "weights": self.weights,
            "solver": self.statistics + self.solving,
            "activations": self._per_token * self.tokens + self.evaluation,
        }
        return ", ".join(f"{name} {memory.show(size)}" for name, size in parts.items())


@dataclass(frozen=True)
class Work:
    """What a treatment of blocks holds at its peak.

    weights, grams: float32 copies of the matrix that is being solved, and of its Gram matrix. tunes: trains whole
    blocks. dense_too: follows the calibration text through the original model as well. twin: the output is a model of
    its own, with other shapes. followed: tokens whose hidden states a survey holds.
    """

    weights: int
    grams: int
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
) -> Needs:
    """What quantizing this checkpoint takes. dtype: of the forward passes. seqlen: tokens per window."""
    method = quantize.find(request.method)
    tunes = method.tuner is not None
    correction = bool(dict(request.options).get("correction"))
    work = Work(*_COPIES[method.solver], tunes=tunes, dense_too=tunes or correction)
    return needs_of(checkpoint, layout, request, work, dtype=dtype, seqlen=seqlen)


def needs_of(
    checkpoint: Checkpoint, layout: Layout, request: RunRequest, work: Work, *, dtype: str, seqlen: int
) -> Needs:
    """What a run takes that treats blocks in this way. dtype: of the forward passes. seqlen: tokens per window."""
    size = tensor_bytes(dtype, (1,))
    tensors = checkpoint.tensors
    hidden = find(
        decoder_config(checkpoint.config),
        "hidden_size",
        "n_embd",
        "d_model",
        default=min(n.columns for n in layout.linears),
    )
    vocabulary = find(decoder_config(checkpoint.config), "vocab_size", default=0)
    outside = sum(tensors[name].nbytes + tensors[name].numel * size for name in layout.outside)
    blocks = [sum(tensors[name].nbytes for name in block) for block in layout.blocks]
    of_block = [layout.of_block(index) for index in range(len(blocks))]
    stacks = [_stacks(linears) for linears in of_block]
    plain = [[linear for linear in linears if linear.expert is None] for linears in of_block]
    experts = [[linear for linear in linears if linear.expert is not None] for linears in of_block]
    routed = find(decoder_config(checkpoint.config), "num_experts_per_tok", "num_experts_per_token", default=1)
    columns = max(_waiting(linears, routed, hidden) for linears in of_block)
    text = request.calibration.dataset != NO_TEXT
    windows = (request.calibration.nsamples or DEFAULT_WINDOWS["calibration"]) if text else 0
    watched = request.evaluation.nsamples or DEFAULT_WINDOWS["evaluation"]
    batch = min(max(batch_tokens("cpu"), seqlen), max(windows, watched) * seqlen)
    widths = max(_outputs(linears, routed) for linears in of_block)
    both = 2 if work.dense_too else 1
    return Needs(
        process=PROCESS,
        # experts are copied into their place, and what becomes of them waits until all of a block are done
        weights=(outside + (5 if layout.experts else 3) * max(blocks)) * (2 if work.twin else 1),
        # of a single expert, and of all of its mixture together
        statistics=4 * max(map(_grams, plain)) * both
        + 8 * max((linear.columns**2 for linear in layout.experts), default=0)
        if text
        else 0,
        apart=4 * max(map(_grams, experts)) if text else 0,
        solving=max(
            max(_solving(rows, columns, work, text) for found in stacks for rows, columns in found),
            _tuning(of_block, batch * widths * size) if work.tunes else 0,
        ),
        forward=batch * (3 * widths + 6 * hidden) * size + batch * seqlen * 4,
        evaluation=(2 * watched * seqlen + work.followed) * hidden * size + 4 * logit_tokens("cpu") * vocabulary * 4,
        stream_per_token=hidden * size * both,
        waiting_per_token=0 if work.dense_too else size * (columns + 2 * hidden),
        tokens=windows * seqlen,
        # by what the machine has, not by what is free now: the same command must take the same path again
        waiting_limit=min(SEQUENTIAL, (request.max_memory or memory.physical()) // 4),
    )


def _stacks(linears: Sequence[Linear]) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices that a block's linears are solved as: one for all that read the same input."""
    rows: dict[tuple[str, int], int] = defaultdict(int)
    for linear in linears:
        rows[linear.name.rpartition(".")[0], linear.columns] += linear.rows
    return [(total, columns) for (_, columns), total in rows.items()]


def _grams(linears: Sequence[Linear]) -> int:
    """Numbers in the Gram matrices of all inputs of some linears."""
    return sum(columns * columns for _, columns in _stacks(linears))


def _outputs(linears: Sequence[Linear], routed: int) -> int:
    """What the linears of a block put out for one token, that passes through `routed` experts of each mixture."""
    first = [linear for linear in linears if linear.expert is not None and linear.expert.index == 0]
    return sum(linear.rows for linear in linears if linear.expert is None) + routed * sum(n.rows for n in first)


def _waiting(linears: Sequence[Linear], routed: int, hidden: int) -> int:
    """The widest input of a linear in a block, per token; experts' own are what `routed` of them made of it."""
    widest = max(linear.columns for linear in linears)
    inner = [linear.columns for linear in linears if linear.expert is not None and linear.rows == hidden]
    return max(widest, routed * max(inner, default=0))


def _solving(rows: int, columns: int, work: Work, text: bool) -> int:
    """Bytes that solving one matrix takes at its peak."""
    return 4 * (work.weights * rows * columns + (work.grams * columns * columns if text else 0))


def _tuning(of_block: Sequence[Sequence[Linear]], outputs: int) -> int:
    """Bytes that tuning a block takes. outputs: those of all its linears' outputs, for the tokens of one step."""
    weights = max(sum(linear.rows * linear.columns for linear in linears) for linears in of_block)
    return _TUNED_WEIGHT * weights + _TUNED_OUTPUTS * outputs


def disk_free(out: Path) -> int:
    """Bytes free where `out` will be, in the nearest folder that exists."""
    place = Path(os.path.abspath(out))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
