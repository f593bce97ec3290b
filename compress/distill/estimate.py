"""How much memory and time a training takes, predicted from shapes; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpare.compress import memory
from llmpare.compress.distill.defaults import Pace
from llmpare.compress.distill.request import TEXT_ALONE, DistillRequest
from llmpare.compress.estimate import process

if TYPE_CHECKING:
    from llmpare.compress.distill.plan import Side

_CHUNK_TOKENS, _WORK = 1024, 6 * 4 * 2**23  # of losses: logits at a time, and what a divergence needs besides
_KEPT = 40  # values per token, block and channel that wait for the backward pass; more than the common families keep
_RATES = {"cpu": 4e10, "cuda": 1.5e14}  # operations per second: two cores; half of what a large GPU can


@dataclass(frozen=True)
class Needs:
    """Bytes by kind on one device of that kind. trained: parameters that have gradients and moments."""

    device: str
    process: int
    teacher: int
    student: int
    activations: int
    logits: int
    trained: int

    @property
    def memory(self) -> int:
        """The peak, in bytes."""
        return self.process + self.teacher + self.student + self.activations + self.logits

    def explain(self) -> str:
        """The parts, for people."""
        parts = ("process", "teacher", "student", "activations", "logits")
        return ", ".join(f"{name} {memory.show(vars(self)[name])}" for name in parts)


def needs(request: DistillRequest, teacher: "Side", student: "Side", pace: Pace, seqlen: int, device: str) -> Needs:
    """What one process takes that holds both models whole."""
    trained = student.parameters
    if request.lora_rank is not None:
        trained = min(trained, 14 * request.lora_rank * student.hidden * student.layers)
    half = device == "cuda" and request.dtype != "float32"
    tokens = pace.micro * seqlen
    per_block = tokens * student.hidden * (2 if half else 4)
    kept = per_block * (2 * student.layers + _KEPT if request.recompute else _KEPT * student.layers)
    chunk = min(_CHUNK_TOKENS, tokens)
    return Needs(
        device=device,
        process=process(),
        teacher=0 if request.loss == TEXT_ALONE else teacher.parameters * teacher_bytes(request, device),
        student=4 * student.parameters + 12 * trained,
        activations=kept,
        logits=2 * 4 * chunk * max(teacher.vocabulary, student.vocabulary) + _WORK,
        trained=trained,
    )


def teacher_bytes(request: DistillRequest, device: str) -> int:
    """Bytes of a weight of the teacher in memory."""
    return 4 if teacher_dtype(request, device) == "float32" else 2


def teacher_dtype(request: DistillRequest, device: str) -> str:
    """The precision the teacher runs in: processors multiply in float32, GPUs in bfloat16."""
    asked = request.teacher_dtype if request.teacher_dtype != "auto" else request.dtype
    by_device: Mapping[str, str] = {"cpu": "float32", "cuda": "bfloat16"}
    return by_device[device] if asked == "auto" else asked


def seconds(request: DistillRequest, teacher: "Side", student: "Side", pace: Pace, seqlen: int, device: str) -> float:
    """Two operations per weight and token for every forward, twice that for the backward pass; on one device."""
    forwards = 4 if request.recompute else 3
    read = 0 if request.loss == TEXT_ALONE else teacher.parameters
    operations = 2 * (forwards * student.parameters + read) * pace.steps * pace.windows * seqlen
    return operations / _RATES[device]
