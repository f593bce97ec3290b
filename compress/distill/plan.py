"""What a distillation will do and take, from headers alone: no torch unless the student is to be built anew."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmpare.compress import memory
from llmpare.compress.calibration import DEFAULT_SEQLEN
from llmpare.compress.checkpoint import locate
from llmpare.compress.checkpoint.files import destination, shown
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.distill import defaults, estimate
from llmpare.compress.distill.defaults import Pace
from llmpare.compress.distill.request import DistillRequest, carving_flags
from llmpare.compress.errors import MemoryLimitError, OutputError, UsageError
from llmpare.compress.estimate import disk_free
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.model.layout import find
from llmpare.compress.plan import plan_prune
from llmpare.compress.prune.cut import ShrinkRequest
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.refusals import refuse_code, refuse_nested
from llmpare.compress.report import show


@dataclass(frozen=True)
class Side:
    """One of the two models, as its headers show it. folder: None if it is yet to be made."""

    name: str
    folder: Path | None
    architecture: str
    parameters: int
    nbytes: int
    vocabulary: int
    longest: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class DistillPlan:
    """carve: the plan by which the student is cut out of the teacher, if it is. need: bytes at the peak."""

    request: DistillRequest
    teacher: Side
    student: Side
    carve: ShrinkPlan | None
    seqlen: int
    pace: Pace
    rate: float
    warmup: int
    need: estimate.Needs
    seconds: float
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """That the student will learn from."""
        return self.pace.steps * self.pace.windows * self.seqlen

    def teacher_dtype(self, device: str) -> str:
        """The precision the teacher runs in, on that kind of device."""
        return estimate.teacher_dtype(self.request, device)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        sides = {
            name: {"model": side.name, "architecture": side.architecture, "parameters": side.parameters}
            for name, side in (("teacher", self.teacher), ("student", self.student))
        }
        return {
            "command": "plan",
            **sides,
            "tokens": self.tokens,
            "steps": self.pace.steps,
            "windows_per_step": self.pace.windows,
            "seqlen": self.seqlen,
            "rate": self.rate,
            "warmup": self.warmup,
            "output_bytes": self.student.nbytes,
            "memory_bytes": self.need.memory,
            "disk_bytes": self.disk,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }

    @property
    def disk(self) -> int:
        """Bytes at the peak: the output, and two checkpoints of weights and both moments of Adam in float32."""
        carved = 0 if self.student.folder else self.student.nbytes
        return self.student.nbytes + carved + 2 * 3 * 4 * self.need.trained

    def lines(self) -> list[str]:
        """The plan for people."""
        request, pace = self.request, self.pace
        named = (("teacher", self.teacher), ("student", self.student))
        return [
            *(f"{name}  {side.architecture}, {show.count(side.parameters)} parameters" for name, side in named),
            f"tokens   {self.tokens:,}: {pace.steps} steps of {pace.windows} windows of {self.seqlen}",
            f"loss     {request.loss}, learning rate up to {self.rate:.2g} after {self.warmup} steps",
            f"output   {memory.show(self.student.nbytes)} from {memory.show(self.teacher.nbytes)}",
            f"memory   about {memory.show(self.need.memory)}: {self.need.explain()}",
            f"disk     {memory.show(self.disk)} in {destination(request.out).parent}",
            f"time     roughly {show.duration(self.seconds)} on {self.need.device}, more on a busy machine",
            *(f"note     {warning}" for warning in self.warnings),
        ]


def plan_distill(request: DistillRequest, *, device: str = "cpu", processes: int = 1) -> DistillPlan:
    """The plan of a run on that kind of device. Raises for everything that cannot work and can be known now."""
    with ExitStack() as stack:
        source = stack.enter_context(open_dense(locate.resolve(request.model, revision=request.revision)))
        _refuse(request, request.model, source)
        teacher = side(request.model, source)
        carve = None
        if request.cut is not None:
            carve = carving(request)
            student = _carved(teacher, carve)
        elif request.student is not None:
            given = stack.enter_context(open_dense(locate.resolve(request.student)))
            _refuse(request, request.student, given)
            student = side(request.student, given)
        else:
            assert request.student_config is not None
            from llmpare.compress.distill.scratch import sketch

            student = sketch(request.student_config, request.trust_remote_code)
    longest = min(teacher.longest, student.longest)
    seqlen = request.calibration.seqlen or min(defaults.SEQLEN, longest)
    if not 2 <= seqlen <= longest:
        raise UsageError(f"--seqlen {seqlen}: these models take 2 to {longest} tokens")
    pace = defaults.pace(request.tokens, seqlen, request.batch_tokens, processes, device)
    rounded = request.student_scheme is not None
    rate = request.rate or defaults.rate(student.parameters, healing=request.healing, rounded=rounded)
    warnings = []
    if teacher.vocabulary != student.vocabulary:
        sizes = f"vocabularies of {teacher.vocabulary:,} and {student.vocabulary:,} tokens"
        warnings.append(f"{sizes}: compared on those that both have")
    return DistillPlan(
        request=request,
        teacher=teacher,
        student=student,
        carve=carve,
        seqlen=seqlen,
        pace=pace,
        rate=rate,
        warmup=defaults.warmup(pace.steps) if request.warmup is None else request.warmup,
        need=estimate.needs(request, teacher, student, pace, seqlen, device),
        seconds=estimate.seconds(request, teacher, student, pace, seqlen, device) / processes,
        warnings=tuple(warnings),
    )


def check_room(plan: DistillPlan, room: int) -> None:
    """Raises MemoryLimitError or OutputError when `room` bytes, --max-memory or the disk do not hold the plan."""
    limit, need = plan.request.max_memory, plan.need.memory
    have = room if limit is None else min(room, limit)
    if need > have:
        what = f"--max-memory {memory.show(have)}" if have == limit else f"{memory.show(have)} available"
        raise MemoryLimitError(
            f"the training needs about {memory.show(need)} of memory, there is {what}: {plan.need.explain()}",
            "--gradient-checkpointing, a smaller --batch-tokens, --lora-rank 16 and --teacher-dtype bfloat16 make it "
            "less; several devices share it under accelerate launch with FSDP",
        )
    free = disk_free(plan.request.out)
    if plan.disk > free:
        raise OutputError(
            f"{shown(plan.request.out)}: output and checkpoints need {memory.show(plan.disk)} of disk, "
            f"{memory.show(free)} are free",
            "free some space or choose another place with -o",
        )


def carving(request: DistillRequest) -> ShrinkPlan:
    """The plan by which prune cuts the student out of the teacher."""
    with carving_flags():
        plan = plan_prune(carve_request(request))
    assert isinstance(plan, ShrinkPlan)
    return plan


def carve_request(request: DistillRequest) -> ShrinkRequest:
    """What prune is asked to do: into the unfinished output, with its own choice of windows from the same text."""
    assert request.cut is not None
    common = ("model", "device", "dtype", "seed", "max_memory", "revision", "trust_remote_code", "allow_nonfinite")
    return ShrinkRequest(
        **{name: vars(request)[name] for name in common},
        out=carved_folder(request.out),
        calibration=replace(request.calibration, nsamples=None),
        evaluation=request.evaluation,
        cut=request.cut,
    )


def carved_folder(out: Path) -> Path:
    """Where a student lies that is made for this run alone."""
    return out.parent / f"{out.name}.partial" / "student"


def side(name: str, source: DenseSource) -> Side:
    """A model as its headers show it."""
    config = source.config
    return sized(
        name,
        config,
        folder=source.folder,
        parameters=source.parameters,
        nbytes=sum(info.nbytes for info in source.tensors.values()),
    )


def sized(name: str, config: Mapping[str, Any], *, folder: Path | None, parameters: int, nbytes: int) -> Side:
    """A model of that config. Models of more than text keep the settings of their decoder in a section of its own."""
    own = {**config, **(config.get("text_config") or {})}
    return Side(
        name=name,
        folder=folder,
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        parameters=parameters,
        nbytes=nbytes,
        vocabulary=find(own, "vocab_size", default=0),
        longest=find(own, "max_position_embeddings", "n_positions", default=DEFAULT_SEQLEN),
        hidden=find(own, "hidden_size", "n_embd", "d_model", default=1024),
        layers=find(own, "num_hidden_layers", "n_layer", "num_layers", default=24),
    )


def _carved(teacher: Side, plan: ShrinkPlan) -> Side:
    parameters = sum(spec.nbytes // tensor_bytes(spec.dtype, (1,)) for spec in plan.specs)
    return replace(
        teacher,
        name="carved from the teacher",
        folder=None,
        parameters=parameters,
        nbytes=plan.output_bytes,
        hidden=plan.sizes.hidden,
        layers=plan.sizes.depth,
    )


def _refuse(request: DistillRequest, name: str, source: DenseSource) -> None:
    """Raises for a model that cannot take part."""
    refuse_code(name, source.config, trusted=request.trust_remote_code)
    refuse_nested(name, source.folder, request.out)
