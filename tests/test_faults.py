"""Every row of the fault table that an offline command line can meet, at the level of that command line.

Tests are named after the number of their row. What each asserts: the exit code, what stderr says, and what is on the
disk afterwards. Row 29, kill −9 at every operation, is in test_crash.py; details of the parts are tested beside them.
"""

import errno
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llmpare.cli import exits
from llmpare.cli.progress import Watcher
from llmpare.compress import calibration, run
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.model.replay import Replay

pytestmark = pytest.mark.usefixtures("one_thread")

Llmpare = Callable[[list[str]], tiny.Ended]
StopAfter = Callable[[int, list[str]], None]

DOWN_1 = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """How a sum is shared out among threads is in its last bits, and here runs in several processes are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llmpare(capsys: pytest.CaptureFixture[str]) -> Llmpare:
    """The command line, in this process."""

    def call(arguments: list[str]) -> tiny.Ended:
        code = exits.main(arguments)
        said = capsys.readouterr()
        assert "a bug in llmpare" not in said.err, said.err
        return tiny.Ended(code, said.out, said.err)

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, which no test may change."""
    return tiny.llama(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tiny.Text:
    return tiny.texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def zygote() -> Iterator[tiny.Zygote]:
    with tiny.Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def undisturbed(
    zygote: tiny.Zygote, model: Path, text: tiny.Text, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the plain command writes for the sound model."""
    out = tmp_path_factory.mktemp("undisturbed") / "w4"
    assert zygote.run(tiny.quantize(model, out, text)).code == 0
    return tiny.contents(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "w4"


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the sound model, to be broken."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def stop_after(llmpare: Llmpare, monkeypatch: pytest.MonkeyPatch) -> StopAfter:
    """Runs a command until block number `index` is finished; there it is stopped as by SIGINT."""

    def stop_after(index: int, command: list[str]) -> None:
        def block(self: Watcher, done: int, total: int, facts: object) -> None:
            if done == index:
                raise exits.Stopped(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Watcher, "block", block)
            assert llmpare(command).code == 130

    return stop_after


def none(out: Path) -> bool:
    """Whether a command has left nothing behind."""
    return not out.parent.exists() or os.listdir(out.parent) == []


def resumable(out: Path) -> bool:
    """Whether there is an unfinished output with a journal, and nothing else."""
    return tiny.names(out.parent) == ["w4.partial"] and "journal.jsonl" in os.listdir(out.parent / "w4.partial")


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return found


def refused(llmpare: Llmpare, command: list[str], code: int, *said: str) -> None:
    """The command fails with that code and says all that, with nothing on stdout."""
    ended = llmpare(command)
    assert ended.code == code, ended.err
    assert ended.out == ""
    for part in said:
        assert part in ended.err
    assert all(line.isprintable() for line in ended.err.splitlines())


def refused_by_all(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, code: int, *said: str) -> None:
    """quantize, plan and inspect all refuse the model, and leave nothing."""
    for command in (tiny.quantize(model, out, text), ["plan", str(model)], ["inspect", str(model)]):
        refused(llmpare, command, code, *said)
    assert none(out)


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **entries}))


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to, a link counting for itself."""
    status = os.lstat(path)
    return status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def place(folder: Path, tensor: str) -> int:
    """Where in model.safetensors a tensor begins."""
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.tensors[tensor].start


# --- the model folder


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_01_model_missing_or_a_file(llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, kind: str) -> None:
    path = tmp_path / "my model"
    if kind == "file":
        path.write_text("x")
    refused_by_all(llmpare, path, out, text, 2, str(path), "expected a folder with config.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        (b'{\n"a": oops}', "config.json':2:6: Expecting value"),
        (b"[1, 2]", "config.json':1:1: holds a list"),
        (b" " * 8_000_001, "8,000,001 bytes"),
    ],
    ids=["missing", "not JSON", "a list", "too large"],
)
def test_02_config(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, content: bytes | None, said: str
) -> None:
    (broken / "config.json").unlink()
    if content is not None:
        (broken / "config.json").write_bytes(content)
    refused_by_all(llmpare, broken, out, text, 3, said)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["LlavaForCausalLM"], "vision_config": {}}, "LlavaForCausalLM"),
        ({"architectures": ["NovelForCausalLM"], "model_type": "novel"}, "NovelForCausalLM"),
        ({"model_type": "gpt2", "n_layer": 2}, "LlamaForCausalLM"),
    ],
    ids=["encoder-decoder", "images", "unknown to transformers", "not what the weights are"],
)
def test_03_architecture(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, entries: dict[str, object], named: str
) -> None:
    edit_json(broken / "config.json", **entries)
    refused(llmpare, tiny.quantize(broken, out, text), 3, f"architecture {named} is not supported", "supported: Llama")
    assert none(out)


def test_03_mixture_of_experts(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    weights = load_file(broken / "model.safetensors")
    moved = {name.replace("mlp.", "mlp.experts.0."): tensor for name, tensor in weights.items()}
    save_file(moved, broken / "model.safetensors", metadata={"format": "pt"})
    refused(llmpare, tiny.quantize(broken, out, text), 3, "LlamaForCausalLM is not supported", "mixture of experts")
    assert none(out)


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("config.json", {"AutoConfig": "bait.Bait", "AutoModelForCausalLM": "bait.Bait"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["bait.Bait", None]}),
    ],
)
def test_04_code_in_the_model_folder(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, file: str, auto_map: dict[str, object]
) -> None:
    """A prompt would end the run too: there is no terminal to answer at, and the exit code would be another."""
    proof = broken / "the code ran"
    bait = f"open({str(proof)!r}, 'w')\nclass Bait: pass"
    (broken / "bait.py").write_text(bait)
    edit_json(broken / file, auto_map=auto_map, tokenizer_class="Bait")
    refused(llmpare, tiny.quantize(broken, out, text), 3, "runs code from the model folder", "--trust-remote-code")
    assert none(out)
    assert not proof.exists()
    exec(bait)
    assert proof.exists(), "the bait is not poisonous"


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_05_pickle(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, name: str) -> None:
    proof = broken / "the pickle ran"
    (broken / "model.safetensors").unlink()
    (broken / name).write_bytes(pickle.dumps(Malicious(proof)))
    refused_by_all(llmpare, broken, out, text, 3, name, "pickle is not loaded", "convert it to safetensors")
    assert not proof.exists()
    pickle.loads((broken / name).read_bytes())
    assert proof.exists(), "the bait is not poisonous"


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shard(path: Path, header: bytes | dict[str, Any], data: int, length: int | None = None) -> None:
    """A safetensors file with a header that may lie. data: bytes after it. length: of the header, as claimed."""
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written) if length is None else length) + written + bytes(data))


A = entry("U8", [4], 0, 4)
LIES: dict[str, tuple[bytes | dict[str, Any], int, int | None, str]] = {
    "header longer than the file": ({"a": A}, 4, 5000, "header claims 5000 bytes"),
    "header longer than 100 MB": ({"a": A}, 4, 2**40, "more than 100,000,000"),
    "not JSON": (b'{"a": oops}', 0, None, ":1:7: Expecting value"),
    "hole": ({"a": A, "b": entry("U8", [4], 8, 12)}, 12, None, ": a hole, 'a' ends at"),
    "overlap": ({"a": A, "b": entry("U8", [4], 2, 6)}, 6, None, ": an overlap, 'a' ends at"),
    "size": ({"a": entry("F32", [3], 0, 8)}, 8, None, "tensor 'a': F32 [3] takes 12 bytes"),
    "overflow": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, 8, None, "tensor 'a': its shape overflows"),
    "negative": ({"a": entry("F32", [-1, -2], 0, 8)}, 8, None, "tensor 'a': negative size -1"),
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, 8, None, "tensor 'a': unknown dtype 'F31'"),
    "trailing bytes": ({"a": A}, 7, None, "3 trailing bytes after 'a'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_06_header_that_lies(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, lie: str) -> None:
    header, data, length, said = LIES[lie]
    tensor = ["tensor 'b'"] if lie in ("hole", "overlap") else []
    write_shard(broken / "model.safetensors", header, data, length)
    tracemalloc.start()
    start = time.perf_counter()
    refused_by_all(llmpare, broken, out, text, 3, "model.safetensors", said, *tensor)
    took, (_, memory) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 3, "one second for each of three commands"
    assert memory < 200e6


def shards(folder: Path, held: dict[str, list[str]], weight_map: dict[str, str]) -> None:
    """Replaces the weights by shards that hold one-byte tensors of these names, and an index."""
    (folder / "model.safetensors").unlink()
    for shard, tensors in held.items():
        header = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(tensors)}
        write_shard(folder / shard, header, len(tensors))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_07_one_name_twice_in_a_header(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    one, two = json.dumps(A), json.dumps(entry("U8", [4], 4, 8))
    write_shard(broken / "model.safetensors", f'{{"a": {one}, "a": {two}}}'.encode(), 8)
    refused_by_all(llmpare, broken, out, text, 3, "'a' occurs twice", "[0, 4]", "[4, 8]")


def test_07_one_tensor_in_two_shards(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    held = {"x.safetensors": ["a", "b"], "y.safetensors": ["b"]}
    shards(broken, held, {"a": "x.safetensors", "b": "y.safetensors"})
    refused_by_all(llmpare, broken, out, text, 3, "tensor 'b' is in 'x.safetensors' and in 'y.safetensors'")


def test_08_truncated(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    path = broken / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 5)
    refused_by_all(llmpare, broken, out, text, 3, f"expected {size} bytes, the file has {size - 5}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        ("<!DOCTYPE html><body>404 Not Found</body>", "is an HTML page"),
    ],
)
def test_08_something_else(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, content: str, said: str) -> None:
    (broken / "model.safetensors").write_text(content)
    refused_by_all(llmpare, broken, out, text, 3, "model.safetensors", said)


def test_09_index_names_missing_shards(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    shards(broken, {"s0.safetensors": ["t0"]}, {f"t{i}": f"s{i}.safetensors" for i in range(8)})
    first_five = ", ".join(f"'s{i}.safetensors'" for i in range(1, 6))
    refused_by_all(llmpare, broken, out, text, 3, f"{first_five} and 2 more, missing")


def test_09_index_and_headers_disagree(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    shards(broken, {"x.safetensors": ["a", *"bcdefgh"]}, {"a": "x.safetensors"})
    refused_by_all(llmpare, broken, out, text, 3, "disagree", "'b', 'c', 'd', 'e', 'f' and 2 more")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x\0.safetensors"])
def test_10_shard_names(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(broken, {"../x.safetensors": ["a"]}, {"a": name})
    opened: list[str] = []
    real = os.open

    def record(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", record)
    refused_by_all(llmpare, broken, out, text, 3, repr(name))
    assert {Path(path).name for path in opened} == {"config.json", "model.safetensors.index.json"}


def test_10_a_folder_of_symbolic_links_is_a_model(
    llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    """As the hub's cache is."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert llmpare(tiny.quantize(snapshot, out, text)).code == 0
    assert tiny.contents(out) == undisturbed


def test_11_already_quantized(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    edit_json(broken / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    for command in (tiny.quantize(broken, out, text), ["plan", str(broken)]):
        refused(llmpare, command, 3, "already quantized", "'awq'")
    assert none(out)


def with_value(value: float) -> tiny.Change:
    """Puts a value into one place of a weight."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[5] = value
        return weight

    return change


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        DOWN_1,
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_12_nonfinite_weight(
    llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, tensor: str, value: float
) -> None:
    """In the last block too: what was finished before is worth nothing."""
    model = tiny.llama(tmp_path / "model", changes={tensor: with_value(value)})
    refused(llmpare, tiny.quantize(model, out, text), 3, f"{tensor} holds 1 values", "--allow-nonfinite")
    assert none(out)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_12_allow_nonfinite(llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, value: float) -> None:
    """Both models count such a weight as 0, so the figures are those of a model that has a 0 there."""
    names = ("model.layers.0.mlp.up_proj.weight", DOWN_1)
    with_zero = tiny.llama(tmp_path / "zero", changes=dict.fromkeys(names, with_value(0.0)))
    broken = tiny.llama(tmp_path / "broken", changes=dict.fromkeys(names, with_value(value)))
    assert llmpare(tiny.quantize(with_zero, out, text)).code == 0
    assert llmpare(tiny.quantize(broken, out.with_name("allowed"), text, "--allow-nonfinite")).code == 0
    assert report(out.with_name("allowed"))["fidelity"] == report(out)["fidelity"]
    weights = "model.safetensors"
    assert (out.with_name("allowed") / weights).read_bytes() == (out / weights).read_bytes()


def test_13_tied_embeddings(llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.llama(tmp_path / "model", tied=True)
    assert llmpare(tiny.quantize(model, out, text, "--format", "dense")).code == 0
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == tiny.tensors(tied=True).keys(), "a head came or a tensor went"
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    expected = AutoModelForCausalLM.from_pretrained(model)
    blocks = {name: tensor for name, tensor in stored.items() if ".layers." in name}
    assert expected.load_state_dict(blocks, strict=False).unexpected_keys == []
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(reloaded(ids).logits, expected(ids).logits)
    assert len(reloaded(ids).logits.unique()) > 1000


def test_14_group_size(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    """128 divides down_proj only."""
    said = "group size does not divide", "model.layers.0.self_attn.q_proj [64, 64]", " and 7 more", "--group-size 64"
    for command in (
        tiny.quantize(model, out, text, "--group-size", "128"),
        tiny.quantize(model, out, text, "--group-size", "128", "--dry-run"),
        ["plan", str(model)],
    ):
        refused(llmpare, command, 3, *said)
    assert none(out)
    assert llmpare(tiny.quantize(model, out, text, "--group-size", "64")).code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "rtn", "--damping", "0.1"), ("rtn has no option --damping", "gptq, tuned")),
        (("--method", "gtpq"), ("unknown method 'gtpq'", "did you mean gptq?", "rtn, gptq, tuned")),
        (("--method", "gptq", "--step-size", "1"), ("gptq has no option --step-size", "belongs to tuned")),
    ],
)
def test_15_options(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, options: tuple[str, ...], said: tuple[str, ...]
) -> None:
    refused(llmpare, tiny.quantize(model, out, text, *options), 2, *said)
    assert none(out)


# --- the text


def test_16_tokenizer_missing(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    (broken / "tokenizer.json").unlink()
    refused(llmpare, tiny.quantize(broken, out, text), 3, str(broken), "expected tokenizer.json")
    assert none(out)


@pytest.mark.parametrize("content", [b"{", b'{"model": 3}', b"\xff"])
def test_16_tokenizer_corrupt(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, content: bytes) -> None:
    (broken / "tokenizer.json").write_bytes(content)
    refused(llmpare, tiny.quantize(broken, out, text), 3, str(broken / "tokenizer.json"))
    assert none(out)


def test_16_tokens_outside_the_vocabulary(
    llmpare: Llmpare, model: Path, broken: Path, tmp_path: Path, out: Path, text: tiny.Text
) -> None:
    edit_json(broken / "config.json", vocab_size=50)
    refused(llmpare, tiny.quantize(broken, out, text), 3, "is outside the model's vocabulary of 50")
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"input_ids": [4096] * 40}))
    command = tiny.quantize(model, out, text, "--dataset", str(ids), "--nsamples", "1")
    refused(llmpare, command, 3, "ids.jsonl, line 1: token id 4096 is outside the model's vocabulary of 4096")
    assert none(out)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'x' * 10 ** 11 }}",
    ],
    ids=["loop", "attribute access", "memory"],
)
def test_17_hostile_chat_template(
    llmpare: Llmpare, broken: Path, tmp_path: Path, out: Path, text: tiny.Text, template: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(calibration, "TEMPLATE_SECONDS", 1.0)
    edit_json(broken / "tokenizer_config.json", chat_template=template)
    dialogues = tmp_path / "dialogues.jsonl"
    row = {"messages": [{"role": "user", "content": text[0].read_text(encoding="utf-8")}]}
    dialogues.write_text(json.dumps(row))
    command = tiny.quantize(broken, out, text, "--dataset", str(dialogues))
    refused(llmpare, [*command, "--chat-template"], 3, "template rejected", "without --chat-template")
    assert none(out)
    assert llmpare(command).code == 0, "a template nobody asked for is not looked at"


HOSTILE = "a\x1b[31m[/x]\n{{x}}"


def test_18_hostile_names(
    llmpare: Llmpare, model: Path, tmp_path: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / HOSTILE
    shutil.copytree(model, folder / "model")
    (folder / "model" / HOSTILE).parent.mkdir()
    (folder / "model" / HOSTILE).write_text("carried over")
    out = folder / "out"
    ended = llmpare(tiny.quantize(folder / "model", out, text))
    assert ended.code == 0
    assert ended.out == str(out).replace("\x1b", "\\x1b").replace("\n", "\\n") + "\n"
    assert all(line.isprintable() for line in ended.err.splitlines())
    assert (out / HOSTILE).read_text() == "carried over"
    assert (out / "model.safetensors").read_bytes() == undisturbed["model.safetensors"]
    assert llmpare(["verify", str(out)]).code == 0
    assert all(line.isprintable() for line in (out / "report.md").read_text(encoding="utf-8").splitlines())
    flip_bit(out / HOSTILE, 0)
    refused(llmpare, ["verify", str(out)], 3, "a\\x1b[31m[/x]\\n{{x}}' is damaged")


def test_19_text_empty(llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(llmpare, tiny.quantize(model, out, text, "--dataset", str(empty)), 3, "0 tokens, and 128 are needed")
    assert none(out)


@pytest.mark.parametrize("flag", ["--nsamples", "--eval-nsamples"])
def test_19_text_too_short(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, flag: str) -> None:
    ended = llmpare(tiny.quantize(model, out, text, flag, "99"))
    assert ended.code == 3
    assert re.search(r"1\d\d\d tokens, and 99 windows of 32 need 3168", ended.err)
    assert none(out)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(10**9)


BAD_TEXT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "not UTF-8": ("a.txt", lambda path: path.write_bytes(b"fine\nfine\nna\xefve\n"), "byte 0xef at offset 12, line 3"),
    "bad JSON": ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text": oops}\n'), "line 2: not JSON"),
    "no text": ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"texts": "b"}\n'), "line 2: no text"),
    "one line of 1 GB": ("a.jsonl", sparse, "line 2: longer than 16 MiB"),
    "1 GB": ("a.txt", sparse, "larger than 64 MiB"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_20_bad_text(llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text, kind: str) -> None:
    name, make, said = BAD_TEXT[kind]
    path = tmp_path / name
    make(path)
    tracemalloc.start()
    refused(llmpare, tiny.quantize(model, out, text, "--dataset", str(path)), 3, str(path), said)
    _, memory = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < 200e6
    assert none(out)


def test_21_archives(llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    for name in ("model.zip", "model.tar.gz"):
        (tmp_path / name).write_bytes(b"PK")
        said = str(tmp_path / name), "archives are not unpacked"
        refused(llmpare, tiny.quantize(tmp_path / name, out, text), 2, *said)
        refused(llmpare, ["plan", str(tmp_path / name)], 2, *said)
        refused(llmpare, tiny.quantize(model, out, text, "--dataset", str(tmp_path / name)), 2, *said)
    assert none(out)


def test_22_no_network(tmp_path: Path, out: Path, text: tiny.Text) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    settings = {"HF_ENDPOINT": nowhere, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "llmpare.cli", *tiny.quantize("org/name", out, text, "--dry-run")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 3, ended.stderr
    assert time.monotonic() - start < 10
    assert "the hub cannot be reached, and its cache has no complete copy" in ended.stderr
    assert "examples/tiny-llama" in ended.stderr
    assert none(out)


def test_23_overlap(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    same = "--eval-dataset", str(text[0]), "--nsamples", "39"
    ended = llmpare(tiny.quantize(model, out, text, *same))
    assert ended.code == 0
    assert "100% of the evaluation text is also in the calibration text" in ended.err
    assert "100% of the evaluation text" in report(out)["warnings"][0]
    assert report(out)["overlap"] == 1
    strict = llmpare(tiny.quantize(model, out.with_name("strict"), text, *same, "--strict"))
    assert strict.code == 4
    assert "--strict: 1 warning" in strict.err
    assert report(out.with_name("strict"))["passed"] is False
    assert llmpare(tiny.quantize(model, out.with_name("other"), text, "--strict")).code == 0


# --- numbers and memory

LOUD = 1e19  # its square is beyond float32
OVERFLOWING = {
    "model.layers.1.post_attention_layernorm.weight": lambda gain: gain * LOUD,
    "model.layers.1.mlp.gate_proj.weight": lambda weight: weight / LOUD,
    "model.layers.1.mlp.up_proj.weight": lambda weight: weight / LOUD,
}


@pytest.mark.parametrize(
    ("changes", "options", "layers", "cause", "action"),
    [
        (
            {},
            ("--damping", "0", "--nsamples", "1"),
            14,
            "Gram matrix not positive definite at damping 0",
            "damping raised to 0.001",
        ),
        (
            OVERFLOWING,
            ("--asym",),
            2,
            "Gram matrix not positive definite, damping tried up to 1",
            "weighted round-to-nearest",
        ),
    ],
    ids=["fewer tokens than columns", "squares overflow"],
)
def test_24_gram_matrix(
    llmpare: Llmpare,
    tmp_path: Path,
    out: Path,
    text: tiny.Text,
    changes: dict[str, tiny.Change],
    options: tuple[str, ...],
    layers: int,
    cause: str,
    action: str,
) -> None:
    model = tiny.llama(tmp_path / "model", changes=changes)
    ended = llmpare(tiny.quantize(model, out, text, *options))
    assert ended.code == 0
    assert f"gate_proj: {action}" in ended.err
    found = report(out)
    assert len(found["fallbacks"]) == layers
    expected = {"name": "model.layers.1.mlp.gate_proj", "cause": cause, "action": action}
    assert expected in found["fallbacks"]
    assert found["fidelity"]["kl"]["mean"] < 0.2, "the fallback is no quantization worth the name"
    strict = llmpare(tiny.quantize(model, out.with_name("strict"), text, *options, "--strict"))
    assert strict.code == 4
    assert f"{layers} fallbacks" in strict.err
    assert tiny.contents(out.with_name("strict")) == tiny.contents(out)


def test_25_nonfinite_activations(llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    model = tiny.llama(tmp_path / "model", changes={DOWN_1: lambda weight: weight * 1e6})
    command = tiny.quantize(model, out, text, "--dtype", "float16")
    refused(llmpare, command, 3, "block 1 gives activations", "NaN or infinite", "--dtype bfloat16", "float32")
    assert resumable(out)
    again = llmpare(command)
    assert (again.code, "block 1 of 2" in again.err) == (3, True)
    assert llmpare(tiny.quantize(model, out, text, "--dtype", "float32", "--restart")).code == 0


def test_27_max_memory(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    refused(
        llmpare,
        tiny.quantize(model, out, text, "--max-memory", "1MiB"),
        6,
        "the run needs about",
        "MiB of memory, there is --max-memory 1 MiB",
    )
    assert none(out)


def test_27_the_hint_fits(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    planned = llmpare([*tiny.quantize(model, out, text, "--nsamples", "39"), "--dry-run", "--json"])
    need = json.loads(planned.out)["memory_bytes"]
    limit = "--max-memory", str(need - 1)
    ended = llmpare(tiny.quantize(model, out, text, "--nsamples", "39", *limit))
    assert ended.code == 6
    assert none(out)
    hint = re.search(r"--nsamples (\d+) fits", ended.err)
    assert hint is not None
    assert int(hint[1]) == 38
    assert llmpare(tiny.quantize(model, out, text, "--nsamples", hint[1], *limit)).code == 0


@pytest.fixture
def device_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """device_memory(block, room): block number `block` runs out of memory with more than `room` windows at a time.

    Returns a list that gets the number of windows of every call that worked.
    """

    def limit(block: int, room: int) -> list[int]:
        real, worked = Replay.run, []

        def replay(self: Replay, index: int, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
            if index == block and len(hidden) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB")
            worked.append(len(hidden))
            return real(self, index, hidden, *more)

        monkeypatch.setattr(Replay, "run", replay)
        return worked

    return limit


@pytest.mark.parametrize("method", ["gptq", "tuned"])
def test_28_device_memory_once(
    llmpare: Llmpare,
    model: Path,
    out: Path,
    text: tiny.Text,
    device_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Half the batch fits: the run goes on from the last finished block, and is as good as any other."""
    monkeypatch.setattr(run, "batch_tokens", lambda device: 4 * tiny.WINDOW)
    options = "--method", method, "--nsamples", "8", *(("--steps", "3") if method == "tuned" else ())
    assert llmpare(tiny.quantize(model, out.with_name("plenty"), text, *options)).code == 0
    worked = device_memory(1, 2)
    ended = llmpare(tiny.quantize(model, out, text, *options))
    assert ended.code == 0
    assert "ran out of memory with 4 windows at a time, trying 2" in ended.err
    assert {4, 2} <= {*worked}
    assert [block["resumed"] for block in report(out)["blocks"]] == [True, False]
    assert tiny.names(out.parent) == ["plenty", "w4"]
    assert llmpare(["verify", str(out)]).code == 0
    found, expected = report(out)["fidelity"], report(out.with_name("plenty"))["fidelity"]
    assert found["perplexity"]["dense"] == pytest.approx(expected["perplexity"]["dense"], rel=1e-5)
    assert found["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=0.1)


def test_28_device_memory_twice(
    llmpare: Llmpare,
    model: Path,
    out: Path,
    text: tiny.Text,
    undisturbed: dict[str, bytes],
    device_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tiny.quantize(model, out, text)
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "run", Replay.run)  # what the context puts back
        device_memory(1, 0)
        refused(llmpare, command, 6, "ran out of memory in block 1", "3.14 GiB", "--device cpu")
        assert resumable(out)
    monkeypatch.undo()
    again = llmpare(command)
    assert (again.code, report(out)["blocks"][0]["resumed"]) == (0, True)
    assert tiny.contents(out) == undisturbed


# --- stopping and starting again


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["30", "31"])
def test_30_31_signals(tmp_path: Path, text: tiny.Text, out: Path, signum: int, code: int, llmpare: Llmpare) -> None:
    """The real process, in the middle of its work; a second signal on the heels of the first changes nothing."""
    model = tiny.llama(tmp_path / "model", blocks=16)
    command = tiny.quantize(model, out, text)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpare.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any("block 2 of 16" in line for line in process.stderr)
    process.send_signal(signum)
    process.send_signal(signum)
    start = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == code
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "block 16 of 16" not in stderr
    assert resumable(out)
    assert llmpare(command).code == 0
    assert report(out)["blocks"][1]["resumed"]
    assert llmpare(tiny.quantize(model, out.with_name("undisturbed"), text)).code == 0
    assert tiny.contents(out) == tiny.contents(out.with_name("undisturbed"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["30", "31"])
@pytest.mark.parametrize("start", [2, 7])
def test_30_31_signals_at_any_time(
    zygote: tiny.Zygote,
    model: Path,
    text: tiny.Text,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    signum: int,
    code: int,
    start: int,
) -> None:
    for point in itertools.count(start, 23):
        out = tmp_path / str(point) / "w4"
        command = tiny.quantize(model, out, text)
        stopped = zygote.run(command, signum=signum, at=point)
        if stopped.code == 0:
            break
        assert stopped.code == code
        assert "stopped; run the same command to resume" in stopped.err
        assert "Traceback" not in stopped.err
        assert none(out) or resumable(out) or "w4" in os.listdir(out.parent)
        assert zygote.run(command).code == 0
        assert tiny.contents(out) == undisturbed
        assert os.listdir(out.parent) == ["w4"]
    assert point > 100


# --- the output


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.usefixtures("full_disk")
def test_32_disk_too_small(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    said = str(out), "the output needs 2 MiB of disk, 977 KiB are free"
    refused(llmpare, tiny.quantize(model, out, text), 5, *said)
    assert none(out)


@pytest.mark.slow
def test_33_every_write_fails_in_turn(
    llmpare: Llmpare, tmp_path: Path, text: tiny.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the disk is in order again, so is the result."""
    model = tiny.llama(tmp_path / "model", blocks=1)
    options = "--method", "rtn", "--dataset", "none"
    assert llmpare(tiny.quantize(model, tmp_path / "expected", text, *options)).code == 0
    expected = tiny.contents(tmp_path / "expected")
    codes = itertools.cycle([errno.ENOSPC, errno.EIO, errno.EROFS])
    for point, code in zip(itertools.count(1), codes, strict=False):
        out = tmp_path / str(point) / "w4"
        out.parent.mkdir()
        command = tiny.quantize(model, out, text, *options)
        with monkeypatch.context() as patch:
            failed = fail_at(patch, point, code)
            ended = llmpare(command)
        if not failed:
            break
        if ended.code == 0:
            assert failed == ["mkdir"], "only a folder that exists need not be made"
        else:
            assert ended.code == 5, ended.err
            assert str(out.parent) in ended.err
            assert os.strerror(code) in ended.err
        if out.exists():
            assert llmpare(["verify", str(out)]).code == 0
        else:
            assert none(out) or resumable(out) or "manifest.json" in os.listdir(out.parent / "w4.partial")
        assert llmpare(command).code == 0
        assert tiny.contents(out) == expected
        assert os.listdir(out.parent) == ["w4"]
    assert point > 80


def fail_at(patch: pytest.MonkeyPatch, point: int, code: int) -> list[str]:
    """Makes the durable operation of that number fail. Returns a list that gets its name."""
    left = itertools.count(point - 1, -1)
    failed: list[str] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if next(left) == 0:
            failed.append(name)
            raise OSError(code, os.strerror(code))

    for name in tiny.DURABLE:
        patch.setattr(os, name, tiny.watched(name, vars(os)[name], before))
    return failed


def test_34_out_is_occupied(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "thesis.tex").write_bytes(b"years of work")
    before = tiny.contents(out)
    refused(llmpare, tiny.quantize(model, out, text), 5, str(out), "holds something else", "--force")
    assert tiny.contents(out) == before
    assert os.listdir(out.parent) == ["w4"]
    assert llmpare(tiny.quantize(model, out, text, "--force")).code == 0
    assert llmpare(["verify", str(out)]).code == 0
    assert os.listdir(out.parent) == ["w4"]


def test_34_finished_with_other_settings(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    assert llmpare(tiny.quantize(model, out, text)).code == 0
    before = tiny.contents(out)
    refused(llmpare, tiny.quantize(model, out, text, "--bits", "3"), 5, "holds something else", "--force")
    assert tiny.contents(out) == before


@pytest.mark.parametrize("where", [".", "inside", "inside/deeper", ".."])
def test_35_out_and_model_in_each_other(llmpare: Llmpare, broken: Path, text: tiny.Text, where: str) -> None:
    before = tiny.contents(broken.parent)
    for flag in ([], ["--force"]):
        command = [*tiny.quantize(broken, broken / where, text), *flag]
        refused(llmpare, command, 2, str(broken), str(broken / where), "inside each other")
    assert tiny.contents(broken.parent) == before


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "file", "pipe", "device"])
@pytest.mark.parametrize("flag", ["--quiet", "--force"])
def test_36_out_is_no_folder(
    llmpare: Llmpare, model: Path, tmp_path: Path, text: tiny.Text, kind: str, flag: str
) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    if kind == "symbolic link":
        target.mkdir()
        out.symlink_to(target)
    elif kind == "dangling link":
        out.symlink_to(target)
    elif kind == "file":
        out.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        out = Path("/dev/null")
    before = identity(out), tiny.names(tmp_path), os.path.exists(target) and os.listdir(target)
    what = {"dangling link": "symbolic link", "device": "device or socket"}.get(kind, kind)
    refused(llmpare, tiny.quantize(model, out, text, flag), 5, str(out), f"is a {what}")
    after = identity(out), tiny.names(tmp_path), os.path.exists(target) and os.listdir(target)
    assert after == before


def test_37_two_runs_at_once(
    llmpare: Llmpare,
    zygote: tiny.Zygote,
    model: Path,
    out: Path,
    text: tiny.Text,
    undisturbed: dict[str, bytes],
) -> None:
    command = tiny.quantize(model, out, text)
    first = zygote.run(command, signum=signal.SIGSTOP, at=60)
    assert first.code == -signal.SIGSTOP
    start = time.monotonic()
    refused(llmpare, command, 7, f"another run (pid {first.pid}) is working in", str(out))
    assert time.monotonic() - start < 5
    assert zygote.resume().code == 0
    assert tiny.contents(out) == undisturbed


def test_37_a_killed_run_holds_no_lock(
    llmpare: Llmpare, zygote: tiny.Zygote, model: Path, out: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    command = tiny.quantize(model, out, text)
    assert zygote.run(command, signum=signal.SIGKILL, at=60).code == -signal.SIGKILL
    assert "lock" in os.listdir(out.parent / "w4.partial")
    assert llmpare(command).code == 0
    assert tiny.contents(out) == undisturbed


@pytest.mark.parametrize("what", ["config", "headers", "weights", "scheme", "text", "version"])
def test_38_resumed_with_something_else(
    llmpare: Llmpare,
    stop_after: StopAfter,
    broken: Path,
    out: Path,
    text: tiny.Text,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tiny.quantize(broken, out, text)
    stop_after(0, command)
    before = tiny.contents(out.parent)
    if what == "config":
        edit_json(broken / "config.json", rms_norm_eps=1e-5)
        said = ["source.config_sha256: "]
    elif what == "headers":
        weights = load_file(broken / "model.safetensors")
        save_file({**weights, "extra.weight": torch.ones(1)}, broken / "model.safetensors", metadata={"format": "pt"})
        said = ["source.headers_sha256: "]
    elif what == "weights":
        flip_bit(broken / "model.safetensors", place(broken, "model.layers.0.mlp.up_proj.weight"))
        said = ["block 0 is not the one that the unfinished output was begun with"]
    elif what == "scheme":
        command += ["--bits", "3", "--asym"]
        said = ["request.scheme.bits: 4, now 3", "request.scheme.symmetric: true, now false"]
    elif what == "text":
        command += ["--dataset", str(text[1])]
        said = ["text.calibration_sha256: ", f'"{text[0]}", now "{text[1]}"']
    else:
        monkeypatch.setattr(run, "VERSION", "99.0")
        said = ["versions.llmpare: ", 'now "99.0"']
    refused(llmpare, command, 3, *said, "--restart")
    after = tiny.contents(out.parent)
    assert {n: d for n, d in after.items() if n != "w4.partial/lock"} == {
        n: d for n, d in before.items() if n != "w4.partial/lock"
    }
    assert llmpare([*command, "--restart"]).code == 0
    assert llmpare(["verify", str(out)]).code == 0


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("three") / "model", blocks=3)


def corrupt_line(unit: str) -> Callable[[Path], None]:
    """Damages the line of the journal that speaks of a unit."""

    def corrupt(partial: Path) -> None:
        path = partial / "journal.jsonl"
        text = path.read_text()
        assert f'"unit": "{unit}"' in text
        path.write_text(text.replace(f'"unit": "{unit}"', '"unit": "block 9"'))

    return corrupt


def tear_last_line(partial: Path) -> None:
    path = partial / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 7)


def damage(tensor: str) -> Callable[[Path], None]:
    """Flips a bit of a tensor in the unfinished output."""

    def flip(partial: Path) -> None:
        (partial / "config.json").write_text("{}")  # a checkpoint is found by it; the run replaces it
        flip_bit(partial / "model.safetensors", place(partial, tensor))

    return flip


DAMAGE: dict[str, tuple[Callable[[Path], None], str, list[bool]]] = {
    "line of block 0": (corrupt_line("block 0"), "journal.jsonl':3: failed its checksum, redoing", [False, True]),
    "torn line": (tear_last_line, "journal.jsonl':4: failed its checksum, redoing", [True, False]),
    "codes": (
        damage("model.layers.0.mlp.up_proj.weight_packed"),
        "block 0 failed its checksum, redoing",
        [False, True],
    ),
    "scale": (
        damage("model.layers.1.self_attn.q_proj.weight_scale"),
        "block 1 failed its checksum, redoing",
        [True, False],
    ),
    "embeddings": (damage("model.embed_tokens.weight"), "outside failed its checksum, redoing", [True, True]),
    "weights gone": (
        lambda partial: (partial / "model.safetensors").unlink(),
        "block 1 failed its checksum, redoing",
        [False, False],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_39_damaged_while_unfinished(
    llmpare: Llmpare,
    stop_after: StopAfter,
    three_blocks: Path,
    tmp_path: Path,
    out: Path,
    text: tiny.Text,
    kind: str,
) -> None:
    make, said, resumed = DAMAGE[kind]
    command = tiny.quantize(three_blocks, out, text)
    stop_after(1, command)
    make(out.parent / "w4.partial")
    ended = llmpare(command)
    assert ended.code == 0
    assert said in ended.err
    assert [block["resumed"] for block in report(out)["blocks"]] == [*resumed, False]
    assert llmpare(tiny.quantize(three_blocks, tmp_path / "clean", text)).code == 0
    assert tiny.contents(out) == tiny.contents(tmp_path / "clean")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def replace_by_a_copy(path: Path) -> None:
    status = path.stat()
    shutil.copyfile(path, path.with_name("copy"))
    os.utime(path.with_name("copy"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_name("copy"), path)


def change_the_last_block(path: Path) -> None:
    flip_bit(path, place(path.parent, DOWN_1))


@pytest.mark.parametrize("change", [touch, replace_by_a_copy, change_the_last_block])
def test_40_source_changes_during_the_run(
    llmpare: Llmpare,
    broken: Path,
    out: Path,
    text: tiny.Text,
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Watcher.block

    def block(self: Watcher, index: int, total: int, facts: Any) -> None:
        if index == 0:
            change(broken / "model.safetensors")
        real(self, index, total, facts)

    monkeypatch.setattr(Watcher, "block", block)
    refused(llmpare, tiny.quantize(broken, out, text), 3, "model.safetensors' changed while it was in use")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "in tensor 'model.layers.0.mlp.up_proj.weight_packed'"),
        ("config.json", "its sha256 is not that of the manifest"),
        ("tokenizer.json", "its sha256 is not that of the manifest"),
        ("manifest.json", ""),
    ],
)
def test_41_one_bit_flipped(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, name: str, said: str) -> None:
    command = tiny.quantize(model, out, text)
    assert llmpare(command).code == 0
    assert llmpare(["verify", str(out)]).code == 0
    flip_bit(out / name, place(out, "model.layers.0.mlp.up_proj.weight_packed") if said.startswith("in tensor") else 9)
    before = tiny.contents(out)
    refused(llmpare, ["verify", str(out)], 3, str(out / name), said)
    again = llmpare(command)
    assert again.code == (5 if name == "manifest.json" else 3), "nor does the same command take it for finished"
    assert tiny.contents(out) == before


GATES = {
    "--max-kl": ("1e-6", "10"),
    "--max-perplexity-increase": ("0%", "1000%"),
    "--min-agreement": ("100%", "1%"),
    "--max-size": ("1MB", "1GB"),
}


@pytest.mark.parametrize("gate", GATES)
def test_42_gates(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, gate: str) -> None:
    tight, loose = GATES[gate]
    options = "--bits", "2", "--method", "rtn", gate
    held = llmpare(tiny.quantize(model, out, text, *options, loose))
    assert held.code == 0
    assert report(out)["passed"] is True
    judged_anew = llmpare(tiny.quantize(model, out, text, *options, tight))
    failed = llmpare(tiny.quantize(model, out.with_name("failed"), text, *options, tight))
    for ended in (judged_anew, failed):
        assert ended.code == 4
        assert re.search(rf"error: {gate[2:]}: \S+.*, the limit is ", ended.err)
    assert failed.out == f"{out.with_name('failed')}\n"
    assert report(out.with_name("failed"))["passed"] is False
    assert tiny.contents(out.with_name("failed")) == tiny.contents(out)


@pytest.mark.parametrize("gates", [(), ("--max-perplexity-increase", "5%")], ids=["no gate", "gate"])
def test_42_perplexity_is_not_a_number(
    llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, gates: tuple[str, ...]
) -> None:
    """A model that cannot be measured has not been shown to be good, gate or no gate."""
    model = tiny.llama(tmp_path / "model", changes={"lm_head.weight": with_value(math.nan)})
    command = tiny.quantize(model, out, text, "--allow-nonfinite", *gates)
    for _ in range(2):
        ended = llmpare(command)
        assert ended.code == 4
        assert "not finite" in ended.err
        assert ended.out == f"{out}\n"
        assert report(out)["passed"] is False
        assert report(out)["fidelity"]["perplexity"]["dense"] is None


def llmpare_process(arguments: list[str], cwd: Path, umask: int = 0o022, **environment: str) -> tiny.Ended:
    """The command line in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "llmpare.cli", *arguments],
        cwd=cwd,
        umask=umask,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=60,
    )
    return tiny.Ended(ended.returncode, ended.stdout.decode("ascii"), ended.stderr.decode("ascii"))


def test_43_same_command_same_bytes(
    model: Path, tmp_path: Path, out: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    command = tiny.quantize(model, out, text)
    ended = llmpare_process(command, tmp_path, 0o027, TZ="Asia/Kathmandu", LC_ALL="tr_TR.UTF-8", PYTHONHASHSEED="7")
    assert ended.code == 0, ended.err
    assert tiny.contents(out) == undisturbed
    for path in (out, *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_43_a_finished_output_is_verified_and_kept(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llmpare(tiny.quantize(model, out, text)).code == 0
    before = {path: identity(path) for path in (out, *out.rglob("*"))}
    monkeypatch.chdir(out.parent)
    again = llmpare(tiny.quantize(model, "w4", text))
    assert (again.code, again.out) == (0, "w4\n")
    assert "verifying" in again.err
    assert "block" not in again.err
    assert {path: identity(path) for path in (out, *out.rglob("*"))} == before


@pytest.mark.parametrize(("stdout", "code"), [("|", 141), ("/dev/full", 5)])
def test_44_nobody_takes_the_result(
    zygote: tiny.Zygote,
    model: Path,
    out: Path,
    text: tiny.Text,
    undisturbed: dict[str, bytes],
    stdout: str,
    code: int,
) -> None:
    ended = zygote.run(tiny.quantize(model, out, text), stdout=stdout)
    assert ended.code == code
    assert f"complete: {out}" in ended.err
    assert tiny.contents(out) == undisturbed


def test_44_ascii_locale(model: Path, tmp_path: Path, text: tiny.Text) -> None:
    out = tmp_path / "größe"
    old = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    ended = llmpare_process(tiny.quantize(model, out, text, "--method", "rtn"), tmp_path, **old)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"{tmp_path}/gr\\")
    assert report(out)["passed"] is True
