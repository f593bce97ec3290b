"""The training itself, by transformers' Trainer: one process or many, whole or sharded, as it was launched."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.files import shown, writing
from llmpare.compress.distill import defaults
from llmpare.compress.distill.lessons import Lessons
from llmpare.compress.distill.pupil import Diverged, Pupil
from llmpare.compress.errors import InputError
from llmpare.compress.progress import Progress

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class Training:
    """How to train. windows: of a step, on all devices together. micro: of them at a time on one device.

    save_steps: between checkpoints; None: by the clock. half: matrix products in bfloat16, weights in float32.
    recompute: keep no activations inside blocks for the backward pass.
    """

    steps: int
    windows: int
    micro: int
    rate: float
    warmup: int
    seed: int
    save_steps: int | None
    half: bool
    recompute: bool
    cpu: bool


@dataclass(frozen=True)
class Trained:
    """curve: step, loss and rate of every logged step. gathered: of a pupil that lies in parts on several devices,
    all that was trained, in the first process; None where the pupil itself holds it.
    """

    curve: list[dict[str, float]]
    gathered: dict[str, Any] | None


def train(
    pupil: Pupil,
    lessons: Lessons,
    training: Training,
    folder: Path,
    progress: Progress,
    saved: Callable[[str], None],
    resume: str | None,
) -> Trained:
    """Trains the pupil's student in place.

    folder: for checkpoints. saved(name): called in the first process once the checkpoint of that name is durable; those
    before it are removed afterwards. resume: the checkpoint to go on from. Raises InputError when the loss is no longer
    finite, saying what is left. A signal that ends the process takes effect after the step, when that is saved.
    """
    from llmpare.compress.distill.watch import Stops, Watch

    kept = resume

    def keep(name: str) -> None:
        nonlocal kept
        _make_durable(folder / name)
        saved(name)
        for other in sorted(os.listdir(folder)):
            if other != name:
                shutil.rmtree(folder / other)
        kept = name

    tokens = training.windows * len(lessons[0]["ids"])
    with Stops() as stops:
        watch = Watch(pupil, stops, progress, tokens, training.save_steps, keep)
        trainer = _trainer(pupil, lessons, training, folder)
        trainer.add_callback(watch)
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
        except Diverged as error:
            left = f"{shown(folder / kept)} is the last good one" if kept else "no checkpoint was due before it"
            raise InputError(
                f"{error} at step {watch.step} of {training.steps}: {left}",
                "try a smaller --lr, a longer --warmup, or --dtype float32; --restart begins afresh",
            ) from error
    curve = [
        {"step": entry["step"], "loss": entry["loss"], "rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    return Trained(curve, gathered)


def _trainer(pupil: Pupil, lessons: Lessons, training: Training, folder: Path) -> "Trainer":
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro,
        learning_rate=training.rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup,
        adam_beta1=defaults.BETAS[0],
        adam_beta2=defaults.BETAS[1],
        weight_decay=defaults.WEIGHT_DECAY,
        max_grad_norm=defaults.CLIP,
        seed=training.seed,
        train_sampling_strategy="sequential",  # the lessons have an order of their own
        logging_steps=max(1, training.steps // defaults.LOGGED),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # when to save is decided in watch
        bf16=training.half,
        use_cpu=training.cpu,
        dataloader_pin_memory=not training.cpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=pupil.partial,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    arguments.gradient_accumulation_steps = training.windows // (training.micro * arguments.world_size)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several devices take part when several processes are launched, not by threads
    if training.recompute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a name that is the only one older releases have
            pupil.student.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = Trainer(model=pupil, args=arguments, train_dataset=lessons)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_durable(folder: Path) -> None:
    """Forces a checkpoint that others wrote to the disk."""
    for place, _, files in os.walk(folder):
        for name in (*files, "."):
            path = Path(place) / name
            with writing(path):
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
