"""A student that is to be quantized: by post-training quantization first, which is where its training begins.

The first is an output of `llmpare quantize` of its own, in a folder beside the training's checkpoints. It gives the
codes and scales to begin with (see qat), the plan of the output, since nothing changes but codes, and the figures that
the report compares with.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmpare.compress.checkpoint.files import copy_file, write_file
from llmpare.compress.checkpoint.read import CONFIG, Checkpoint
from llmpare.compress.checkpoint.tensors import DTYPES, from_info, to_bytes
from llmpare.compress.checkpoint.write import CheckpointWriter
from llmpare.compress.distill import output, qat
from llmpare.compress.distill.request import DistillRequest
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.grid import IntGrid
from llmpare.compress.model.layout import Linear
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.plan import plan_quantize
from llmpare.compress.quantize import resolve
from llmpare.compress.quantize.plan import QuantizePlan
from llmpare.compress.request import QuantizeRequest, TextSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "gptq"


def folder(out: Path) -> Path:
    """Where the student lies as post-training quantization makes it, in the unfinished output."""
    return out.parent / f"{out.name}.partial" / "rounded"


def quantize_request(request: DistillRequest, student: Path) -> QuantizeRequest:
    """What quantize is asked to do with the student: with its own choice of windows from the text to learn from."""
    scheme = request.student_scheme
    assert scheme is not None
    return QuantizeRequest(
        model=str(student),
        out=folder(request.out),
        calibration=TextSpec(request.calibration.dataset, None, request.calibration.seqlen),
        evaluation=request.evaluation,
        device=request.device,
        dtype=request.dtype,
        seed=request.seed,
        max_memory=request.max_memory,
        trust_remote_code=request.trust_remote_code,
        allow_nonfinite=request.allow_nonfinite,
        scheme=scheme,
        method=METHOD,
        options=resolve(METHOD, {}),
        format=request.format,
    )


def begin(request: DistillRequest, student: DenseSource) -> qat.Rounding:
    """The extension that trains a student as it will be rounded, from what quantize has made of it."""
    plan = plan_quantize(quantize_request(request, student.folder))
    names = _modules(plan, student)
    starts = {}
    with Checkpoint.open(plan.request.out) as rounded:
        for linear, scheme in plan.quantized.items():
            tensors = {
                spec.name: from_info(rounded.read(spec.name), rounded.tensors[spec.name])
                for spec in plan.format.specs(linear, scheme)
            }
            grid = IntGrid(scheme.bits, scheme.symmetric, DTYPES[plan.format.scale_dtype(linear)])
            starts[names[linear]] = qat.Start(plan.format.solved(linear, scheme, tensors), grid)
    return qat.Rounding(starts)


def write(
    place: Path, student: "PreTrainedModel", source: DenseSource, request: DistillRequest, rounding: qat.Rounding
) -> dict[str, str]:
    """Writes the trained student to the folder `place`, its codes as codes. Returns the sha256 of every tensor.

    source: the student as it came. rounding: finished.
    """
    plan = plan_quantize(quantize_request(request, source.folder))
    names = _modules(plan, source)
    stored = output.as_stored(student)
    encoded: dict[str, Tensor] = {}
    digests = {}
    with CheckpointWriter(place, plan.specs) as writer:
        for spec in plan.specs:
            if spec.name not in encoded:
                encoded |= _encoded(plan, names, rounding, spec.name)
            if spec.name in encoded:
                tensor = encoded.pop(spec.name)
            elif spec.name in stored:
                tensor = stored[spec.name]
            else:
                tensor = source.tensor(spec.name, DTYPES[spec.dtype])
            digests[spec.name] = writer.write(spec.name, to_bytes(tensor.detach().to("cpu", DTYPES[spec.dtype])))
        writer.sync()
    for name in source.checkpoint.files:
        copy_file(source.folder / name, place / name)
    copy_file(plan.request.out / CONFIG, place / CONFIG)
    for name, data in plan.files().items():
        write_file(place / name, data)
    return digests


def _encoded(plan: QuantizePlan, names: dict[Linear, str], rounding: qat.Rounding, name: str) -> dict[str, Tensor]:
    """All tensors of the linear that one of them, called `name`, belongs to; none if it belongs to no linear."""
    owner = name.rpartition(".")[0]
    for linear, scheme in plan.quantized.items():
        if linear.name == owner:
            return plan.format.encode(linear, scheme, rounding.solved[names[linear]])
    return {}


def _modules(plan: QuantizePlan, student: DenseSource) -> dict[Linear, str]:
    """The module of every linear that is quantized."""
    trust = plan.request.trust_remote_code
    skeleton = Skeleton(student, plan.layout, torch.float32, torch.device("cpu"), trust=trust)
    return {linear: skeleton.names[linear.weight].removesuffix(".weight") for linear in plan.quantized}
