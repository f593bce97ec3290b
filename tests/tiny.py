"""Models that are compressed in a fraction of a second, and processes to do it in that start in no time."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import drawings
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmpare import calibration_data
from llmpare.cli.exits import main
from llmpare.compress.report.page import svg

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
HIDDEN, INNER, HEADS, VOCABULARY = 64, 128, 2, 4096
WINDOW = 32  # tokens
REPORTS = ("report.json", "report.md", "report.html")  # hold clocks

Change = Callable[[Tensor], Tensor]
Text = tuple[Path, Path]


def config(
    *, blocks: int = 2, tied: bool = False, hidden: int = HIDDEN, inner: int = INNER, **more: object
) -> dict[str, object]:
    """config.json of the model below."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": hidden // HEADS,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }


def tensors(*, blocks: int = 2, tied: bool = False, hidden: int = HIDDEN, inner: int = INNER) -> dict[str, Tensor]:
    """Random weights in float32, the same ones every time."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, hidden), "model.norm": (hidden,)}
    if not tied:
        shapes["lm_head"] = (VOCABULARY, hidden)
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes[f"{block}.input_layernorm"] = shapes[f"{block}.post_attention_layernorm"] = (hidden,)
        for name, rows in (("q", hidden), ("k", hidden // HEADS), ("v", hidden // HEADS), ("o", hidden)):
            shapes[f"{block}.self_attn.{name}_proj"] = (rows, hidden)
        for name in ("gate", "up"):
            shapes[f"{block}.mlp.{name}_proj"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj"] = (hidden, inner)
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {n: 1 + 0.1 * w if w.ndim == 1 else w * w.shape[1] ** -0.5 for n, w in weights.items()}


def llama(
    folder: Path,
    *,
    changes: Mapping[str, Change] | None = None,
    blocks: int = 2,
    tied: bool = False,
    hidden: int = HIDDEN,
    inner: int = INNER,
) -> Path:
    """A random Llama with the tokenizer of examples/tiny-llama. changes: what happens to its tensors, by name."""
    shape: dict[str, Any] = {"blocks": blocks, "tied": tied, "hidden": hidden, "inner": inner}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(**shape), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    weights = tensors(**shape)
    for name, change in (changes or {}).items():
        weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def texts(folder: Path) -> Text:
    """A little text to calibrate on and a little to measure with, about 1,200 tokens each, which share nothing."""
    found = []
    for part in ("calibration", "evaluation"):
        path = folder / f"{part}.txt"
        rows = itertools.islice(calibration_data.rows("bundled", part), 2)
        path.write_text("\n\n".join((row.text or "")[:3000] for row in rows), encoding="utf-8")
        found.append(path)
    return found[0], found[1]


def quantize(model: Path | str, out: Path | str, text: Text, *more: str) -> list[str]:
    """The command line of a short run; what is in `more` wins."""
    return [
        "quantize", str(model), "-o", str(out), "--dataset", str(text[0]), "--eval-dataset", str(text[1]),
        "--nsamples", "4", "--eval-nsamples", "2", "--seqlen", str(WINDOW), "--group-size", "32", "--device", "cpu",
        *more,
    ]  # fmt: skip


def prune(model: Path | str, out: Path | str, text: Text, *more: str) -> list[str]:
    """The command line of a short run that removes structure, or sets weights to zero."""
    command = quantize(model, out, text)
    at = command.index("--group-size")
    return ["prune", *command[1:at], *command[at + 2 :], *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the reports."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in REPORTS
    }


def names(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    return sorted(os.listdir(folder))


# --- what reaches the disk

DURABLE = ("open", "mkdir", "pwrite", "posix_fallocate", "ftruncate", "fsync", "rename", "replace", "unlink", "rmdir")


def watched(name: str, real: Callable[..., Any], before: Callable[[str, tuple[Any, ...]], None]) -> Callable[..., Any]:
    """The function of `os` called `name`, with a call of before(name, arguments) if it is about to change the disk."""

    def call(*arguments: Any, **options: Any) -> Any:
        if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR):
            before(name, arguments)
        return real(*arguments, **options)

    return call


# --- processes


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that ended it, and what it printed."""

    code: int
    out: str
    err: str
    pid: int = 0


class Zygote:
    """A process that has everything imported and forks a child per command, which takes milliseconds, not seconds.

    A process of its own, since one that has trained anything cannot be forked: torch's autograd would refuse.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, arguments: Sequence[str], *, signum: int = 0, at: int = 0, stdout: str = "") -> Ended:
        """`llmpare ARGUMENTS`, to its end or, if the signal is SIGSTOP, until `resume`.

        signum: a signal that it gets before its durable operation number `at`, from 1. stdout: a file to print to;
        '|' is a pipe whose reader has gone.
        """
        return self._ask(arguments=list(arguments), signum=signum, at=at, stdout=stdout)

    def states(self, arguments: Sequence[str], folder: Path, copies: Path) -> Ended:
        """`llmpare ARGUMENTS` to its end; `folder` is copied wherever a death would leave it in a state of its own.

        These are the states before each durable operation, and those in the middle of each write; copies / N is the
        first that differs from the one before at operation N, copies / N-torn in the middle of it.
        """
        return self._ask(arguments=list(arguments), watched=str(folder), copies=str(copies))

    def resume(self) -> Ended:
        """Lets the run that was stopped go on to its end."""
        return self._ask()

    def _ask(self, **request: object) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


def _serve() -> None:
    """The zygote: a request per line of stdin, an Ended per line of stdout. Its reports hold no drawings."""
    svg.draw = drawings.blank
    with tempfile.TemporaryDirectory() as place:
        _warm_up(Path(place))
        stopped = 0
        for line in sys.stdin:
            request = json.loads(line)
            if request:
                pid = os.fork()
                if pid == 0:
                    _child(Path(place), **request)
            else:
                pid = stopped
                os.kill(pid, signal.SIGCONT)
            _, status = os.waitpid(pid, os.WUNTRACED)
            stopped = pid if os.WIFSTOPPED(status) else 0
            code = -signal.SIGSTOP if stopped else os.waitstatus_to_exitcode(status)
            printed = [(Path(place) / name).read_text(encoding="utf-8") for name in ("out", "err")]
            print(json.dumps(asdict(Ended(code, *printed, pid))), flush=True)


def _warm_up(place: Path) -> None:
    """Imports what is imported on the way, by a run that trains nothing and leaves no thread behind."""
    (place / "out").mkdir()
    stdout = sys.stdout
    sys.stdout = sys.stderr
    command = quantize(llama(place / "model"), place / "out" / "w4", texts(place), "--method", "rtn", "--quiet")
    assert main(command) == 0
    sys.stdout = stdout
    shutil.rmtree(place / "out")


def _child(
    place: Path,
    arguments: list[str],
    signum: int = 0,
    at: int = 0,
    stdout: str = "",
    watched: str = "",
    copies: str = "",
) -> NoReturn:
    status = 255
    try:
        _print_to(1, stdout or str(place / "out"))
        _print_to(2, str(place / "err"))
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8") for fd in (1, 2))
        _watch(_copying(Path(watched), Path(copies)) if copies else _interrupting(signum, at))
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _print_to(fd: int, name: str) -> None:
    if name == "|":
        reader, target = os.pipe()
        os.close(reader)
    else:
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, fd)
    os.close(target)


Before = Callable[[str, tuple[Any, ...]], None]


def _watch(before: Before) -> None:
    """Has before(name, arguments) called at each durable operation of this process. The disk is left to the kernel's
    cache: a process that dies loses nothing of what is there, and waiting for the disk is what takes the time.
    """
    os.fsync = lambda fd: None
    for name in DURABLE:
        setattr(os, name, watched(name, vars(os)[name], before))


def _interrupting(signum: int, at: int) -> Before:
    """Sends this process a signal at its durable operation number `at`."""
    left = itertools.count(at - 1, -1)

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signum)

    return before


def _copying(folder: Path, copies: Path) -> Before:
    """Copies a folder at every durable operation, unless it is as it was copied last."""
    numbers, pwrite, last = itertools.count(1), os.pwrite, [b""]
    copying = [False]

    def copy(name: str) -> None:
        files = sorted(path for path in folder.rglob("*"))
        state = hashlib.sha256()
        for path in files:
            state.update(f"{path.relative_to(folder)} {path.is_dir()} ".encode())
            state.update(b"" if path.is_dir() else hashlib.sha256(path.read_bytes()).digest())
        if state.digest() != last[0]:
            last[0] = state.digest()
            shutil.copytree(folder, copies / name)

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if copying[0]:
            return  # the copy's own operations
        copying[0] = True
        number = next(numbers)
        copy(str(number))
        if name == "pwrite":
            fd, data, offset = arguments
            pwrite(fd, bytes(data)[: len(data) // 2], offset)
            copy(f"{number}-torn")
        copying[0] = False

    return before


_LIMITED = """
import resource, sys
import torch, transformers
from llmpare.cli.exits import main
import llmpare.compress.run, llmpare.compress.evaluate.run
from transformers.models.llama import modeling_llama
used = int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def limited(command: Sequence[str], room: int) -> subprocess.CompletedProcess[str]:
    """The command line in a process that may have `room` bytes of private memory beyond what imports reserve."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-c", _LIMITED, str(room), *command]
    return subprocess.run(words, capture_output=True, encoding="utf-8", env=environment, check=False)


if __name__ == "__main__":
    _serve()
