"""Tasks of the lm-eval library: found by name, built, and put to a model. The only file that knows that library.

Its words: a task has documents, and asks the model about each; a group has tasks; a tag stands for several. What it
prints is dropped here; what it warns of while a model answers is kept.
"""

import difflib
import functools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmpare.calibration_data import presets
from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate.quiet import Notes, silence
from llmpare.compress.evaluate.request import TasksRequest

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel

SEED = 1234  # what lm-eval's own command line draws few-shot examples with

# What reading a data set, and filling templates with it, can raise when a task is not sound.
UNSOUND = (ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Entry:
    """Where a task, tag or group is found. spec: what its manager loads it by. folder: of its files, if the user's."""

    manager: "TaskManager"
    spec: str
    folder: Path | None = None


@dataclass(frozen=True)
class Answers:
    """What a model made of a task, a tag or a group. results: as lm-eval returns them. tasks: all there were."""

    results: Mapping[str, Any]
    tasks: "Mapping[str, Task]"
    warnings: tuple[str, ...]


def require() -> None:
    """Raises UsageError when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UsageError("--tasks needs the package 'lm-eval', which is not installed", "pip install 'llmpare[eval]'")


def find(names: Sequence[str], include: Path | None) -> dict[str, Entry]:
    """The tasks of these names, in `include` (a folder with YAML files, or one such file) or else in lm-eval.

    Raises UsageError for a name that neither has, InputError for a file that describes no task.
    """
    own = {} if include is None else _from_file(include) if include.is_file() else _from_folder(include, names)
    found = {}
    for name in names:
        if name not in own and name not in _built_in().all_tasks:
            near = difflib.get_close_matches(name, [*own, *_built_in().all_tasks], 1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"unknown task {name!r}", f"{guess}--include takes a folder with tasks of your own as YAML"
            )
        found[name] = own[name] if name in own else Entry(_built_in(), name)
    return found


def build(name: str, entry: Entry) -> "TaskDict":
    """The task of that name, all tasks of a group, or those that a tag stands for, with their documents.

    Paths in a task of the user's are relative to the file that it is in. Raises InputError for a task that cannot be
    built, UsageError for one that would run code a model writes.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    if entry.folder is None:
        presets.offline(name, "a task of your own needs no network, see --include")
    try:
        with chdir(entry.folder or Path()), silence(), _uncounted():
            _seed()
            loaded = entry.manager.load([entry.spec])
    except (*UNSOUND, OSError, RuntimeError, StopIteration, yaml.YAMLError, TemplateError) as error:
        raise _cannot_build(name, entry, error) from error
    except DatasetsError as error:  # which says little by itself
        raise _cannot_build(name, entry, error.__cause__ or error) from error
    for task in loaded["tasks"].values():
        if task.get_config("unsafe_code"):
            raise UsageError(f"task {task.task_name!r} runs code that the model writes", "choose another task")
    return loaded


def answer(name: str, built: "TaskDict", model: "PreTrainedModel", tokenizer: Any, asked: TasksRequest) -> Answers:
    """The model's results, document by document. Raises InputError for a document that does not fit its task."""
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    notes, num_fewshot = Notes(), asked.num_fewshot
    for task in built["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if num_fewshot is None or fixed == 0:  # asked without examples on purpose: lm-eval's rule
            task.set_config("num_fewshot", fixed or 0)
            if num_fewshot:
                notes.add(f"task {task.task_name} is made to be asked without examples, --num-fewshot is not for it")
        else:
            task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(SEED)
    try:
        with silence():
            _seed()
            model_of_lm_eval = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_size)
            with notes.taken("lm_eval"):
                # Its own standard errors are drawn at random by a pool of processes.
                results = evaluate(model_of_lm_eval, built, limit=asked.limit, bootstrap_iters=0, log_samples=True)
    except (*UNSOUND, TemplateError) as error:
        raise InputError(f"task {name!r} cannot be put to the model: {_line(error)}") from error
    return Answers(results, built["tasks"], notes.messages())


@functools.cache
def _built_in() -> "TaskManager":
    """lm-eval's own tasks. Finding them takes seconds, and they stay the same as long as the process runs."""
    from lm_eval.tasks import TaskManager

    with silence():
        return TaskManager()


def _from_file(file: Path) -> dict[str, Entry]:
    from lm_eval.tasks import TaskManager

    try:
        content = yaml.load(file.read_bytes(), Loader=_TaskFile)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as a task: {_line(error)}") from error
    name = (content.get("group") or content.get("task")) if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{file} names no task", "a task is YAML with task: NAME, dataset_path: json, …")
    path = file.absolute()
    manager = _built_in() if "group" in content else TaskManager(include_defaults=False)
    return {name: Entry(manager, str(path), path.parent)}


def _from_folder(folder: Path, names: Sequence[str]) -> dict[str, Entry]:
    from lm_eval.tasks import TaskManager

    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist", "--include takes a folder with tasks as YAML, or one such file")
    with silence():
        manager = TaskManager(include_path=folder.absolute(), include_defaults=False)
        index = manager.task_index
        if not _members(names, index).issubset(index):  # a group of the user's with tasks of lm-eval
            manager = TaskManager(include_path=folder.absolute())
    places = {name: entry.yaml_path for name, entry in index.items()}
    for tag in manager.all_tags:  # has no file of its own; its tasks are taken to be in one folder
        if tag in places:
            places[tag] = places[min(index[tag].tags)]
    return {name: Entry(manager, name, path.absolute().parent) for name, path in places.items()}


def _members(names: Iterable[str], index: Mapping[str, Any]) -> set[str]:
    """Names of everything in the groups among `names`, at any depth."""
    found: set[str] = set()
    pending = {name for name in names if name in index}
    while pending:
        entry = index.get(pending.pop())
        inside = entry.cfg.get("task") if entry is not None and entry.cfg else None
        if isinstance(inside, list):
            new = {item if isinstance(item, str) else item.get("task", "") for item in inside}
            pending |= new - found
            found |= new
    return found


class _TaskFile(yaml.SafeLoader):
    """Reads a task without the code that it names."""


_TaskFile.add_multi_constructor("!", lambda loader, suffix, node: None)


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keeps `datasets` from telling the network about every data set it loads, local ones included."""
    from datasets import config

    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _seed() -> None:
    """Some tasks draw at random; every model is to get the same."""
    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _cannot_build(name: str, entry: Entry, error: BaseException) -> InputError:
    why = "it has no documents" if isinstance(error, StopIteration | IndexError) else _line(error)
    hint = "" if entry.folder is None else f"its files are expected in {entry.folder}"
    return InputError(f"task {name!r} cannot be built: {why}", hint)


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return clipped(" ".join(str(error).split()) or type(error).__name__)
