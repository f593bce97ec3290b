"""How much memory an evaluation takes at its peak, predicted from shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmpare.compress import memory
from llmpare.compress.activations import per_token, windows_at_once
from llmpare.compress.batches import batch_tokens, logit_tokens
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.errors import MemoryLimitError, UnsupportedError
from llmpare.compress.estimate import process
from llmpare.compress.evaluate.models import Subject
from llmpare.compress.model.layout import decoder_config, find, layout


@dataclass(frozen=True)
class Needs:
    """Bytes. fixed: whatever the text. per_token: of the hidden states that are kept for every token of it."""

    fixed: int
    per_token: int

    def check(self, tokens: int, seqlen: int, room: int, limit: int | None) -> None:
        """Raises MemoryLimitError when `room` bytes, or the limit that was set, do not hold that many tokens."""
        have = room if limit is None else min(room, limit)
        fit = (have - self.fixed) // (self.per_token * seqlen)
        hint = f"--nsamples {fit} fits" if fit > 0 else "no number of windows fits; use a larger machine"
        _require("the evaluation needs", self.fixed + self.per_token * tokens, room, limit, hint)


def require_whole(subjects: Sequence[Subject], *, dtype: str, room: int, limit: int | None) -> None:
    """Raises MemoryLimitError for the first model that, unlike for its fidelity, is to be wholly in memory for tasks,
    and does not fit into `room` bytes or the limit that was set.
    """
    for subject in subjects:
        need = process() + subject.source.parameters * tensor_bytes(dtype, (1,))
        _require(f"{subject.given} as a whole, for --tasks, needs", need, room, limit, "leave out --tasks")


def _require(what: str, need: int, room: int, limit: int | None, hint: str) -> None:
    have = room if limit is None else min(room, limit)
    if need > have:
        there = f"--max-memory {memory.show(have)}" if have == limit else f"{memory.show(have)} available"
        raise MemoryLimitError(f"{what} about {memory.show(need)} of memory, there is {there}", hint)


def needs(subjects: Sequence[Subject], *, dtype: str, device: str, seqlen: int, paired: bool) -> Needs:
    """What running these models takes. paired: every candidate beside a baseline that was run before it."""
    size = tensor_bytes(dtype, (1,))
    at_once = 2 if paired else 1
    fixed = hidden = 0
    for subject in subjects:
        weights, working, width = _one(subject, dtype, device, seqlen)
        hidden = max(hidden, width)
        fixed = max(fixed, at_once * weights + working)
    logits = (2 + 2 * at_once) * logit_tokens(device) * max(subject.vocabulary for subject in subjects) * 4
    return Needs(process() + fixed + logits, at_once * hidden * size)


def _one(subject: Subject, dtype: str, device: str, seqlen: int) -> tuple[int, int, int]:
    """(what stays in memory until the scores are made, what is needed on the way, hidden size) of a model."""
    source, size = subject.source, tensor_bytes(dtype, (1,))
    infos = source.tensors
    try:
        found = layout(source)
    except UnsupportedError:
        hidden = int(find(decoder_config(source.config), "hidden_size", "n_embd", "d_model", default=4096))
        return source.parameters * size, batch_tokens(device) * 16 * hidden * size, hidden
    narrow = min(linear.columns for linear in found.linears)
    hidden = int(find(decoder_config(source.config), "hidden_size", "n_embd", "d_model", default=narrow))
    outside = sum(infos[name].numel * size for name in found.outside)
    block = max(sum(infos[name].numel for name in names) for names in found.blocks)
    at_once = windows_at_once(source, seqlen, device) * seqlen
    forward = at_once * per_token(source, found.linears, 0, hidden, dtype=dtype, seqlen=seqlen, device=device)
    return outside, 3 * block * size + max(infos[name].numel * size for name in found.outside) + forward, hidden
