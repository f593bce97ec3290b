"""How much memory a run takes at its peak, predicted from shapes; no torch."""

import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmpare.compress import quantize
from llmpare.compress.activations import experts_per_token, per_token, waiting, widest_input, windows_at_once
from llmpare.compress.batches import batch_tokens, experts_at_once, weights_at_once
from llmpare.compress.calibration import DEFAULT_WINDOWS
from llmpare.compress.checkpoint.files import destination, files_below, writing
from llmpare.compress.checkpoint.header import TensorInfo, tensor_bytes
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.hardware import torch_for_gpus
from llmpare.compress.model.layout import Layout, Linear, decoder_config, find
from llmpare.compress.needs import Needs
from llmpare.compress.request import NO_TEXT, QuantizeRequest, RunRequest, Scheme

_PROCESS = 480 * 2**20  # an interpreter with torch and transformers imported
_CUDA_BUILD = 360 * 2**20  # what the libraries of a torch for GPUs take beyond that, on whatever device a run works


# Measured, and rounded up. What a solver holds at its peak, in float32: copies of the weights, of their Gram matrix,
# and of those rows of the weights that it takes at once.
_COPIES = {"rtn:solve_alike": (3, 0, 0), "gptq:solve_alike": (1.3, 1, 9)}
_TUNED_WEIGHT = 48  # bytes: the weight, its place, offset, gradients and the two moments of Adam
_TUNED_OUTPUTS = 7  # what automatic differentiation keeps, in units of what the linears put out


def process() -> int:
    """Bytes that any run of this installation takes, with torch and transformers imported; imports neither."""
    return _PROCESS + (_CUDA_BUILD if torch_for_gpus() else 0)


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
    of_block = [layout.of_block(index) for index in range(len(blocks))]
    columns = max(widest_input(linears, experts_per_token(config), hidden) for linears in of_block)
    both = 2 if work.dense_too else 1
    grams = max((count * columns**2 for found in stacks for _, columns, count in found), default=0)
    if work.dense_too:  # of all inputs at once
        grams = 2 * max((sum(columns**2 for _, columns, _ in found) for found in stacks), default=0)
    models = 2 if work.twin else 1
    found = Needs(
        process=process(),
        outside=sum(sizes[name] for name in layout.outside) * models,
        entering=max(loaded) * models + checkpoint.decoding,
        head=max((sizes[name] for name in layout.outside), default=0),
        # experts are copied into their place, and what becomes of them waits until all of a block are done
        block=int(max(blocks) * (work.blocks + (2 if layout.experts else 0))) * models,
        following=max(sum(tensors[name].nbytes for name in block) for block in layout.blocks) + checkpoint.decoding,
        # and of all experts of a mixture together
        statistics=4 * (grams + max((n.columns**2 for n in layout.experts), default=0)) if text else 0,
        solving=max(
            max((_solving(*stack, work, text, device) for found in stacks for stack in found), default=0),
            _tuning(treated, min(batch_tokens("cpu"), windows * seqlen) * size) if work.tunes else 0,
        ),
        forward_per_token=per_token(
            checkpoint, layout.linears, columns if text else 0, hidden, dtype=dtype, seqlen=seqlen, device=device
        ),
        stream_per_token=hidden * size * both,
        waiting_per_token=0
        if work.dense_too
        else max(
            waiting(checkpoint, linears, hidden, dtype=dtype, seqlen=seqlen, device=device) for linears in of_block
        ),
        watched=(2 * scored * seqlen + work.followed) * hidden * size,
        logits_per_position=5 * vocabulary * 4,
        tokens=windows * seqlen,
        at_once=min(max(windows, scored), windows_at_once(checkpoint, seqlen, device)) * seqlen,
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


def _solving(rows: int, columns: int, count: int, work: Work, text: bool, device: str) -> int:
    """Bytes that solving `count` matrices in one loop takes at its peak."""
    weights = count * rows * columns
    at_once = work.rows * min(weights, max(weights_at_once(device), columns))
    copies = work.grams + (2 if count > 1 and work.grams else 0)  # what is solved together lies in one piece
    return 4 * (int(work.weights * weights) + at_once + (copies * count * columns**2 if text else 0))


def _tuning(of_block: Sequence[Sequence[Linear]], bytes_: int) -> int:
    """Bytes that tuning a block takes. bytes_: those of one number for every token of one step."""
    weights = max(sum(linear.rows * linear.columns for linear in linears) for linears in of_block)
    outputs = max(sum(linear.rows for linear in linears) for linears in of_block)
    return _TUNED_WEIGHT * weights + _TUNED_OUTPUTS * outputs * bytes_


def disk_free(out: Path) -> int:
    """Bytes that a run can fill with `out`: free in the nearest folder that exists, or taken by an unfinished one."""
    place = destination(out)
    taken = sum(path.lstat().st_blocks * 512 for path in files_below(Path(f"{place}.partial")))
    with writing(place):
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free + taken
