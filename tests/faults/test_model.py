"""Rows 1 to 15 and 18: the model folder and the options."""

import json
import math
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faults.kit import DOWN_1, Llmpare, edit_json, none, refused, refused_by_all, report, with_value
from safetensors.torch import load_file, save_file

from llmpare.compress.checkpoint.read import Checkpoint


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
    ("entries", "said"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', and a whole number is needed"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"num_hidden_layers": 0}, "promises 0 blocks"),
        ({"num_hidden_layers": 10**9}, "promises 1000000000 blocks"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x'"),
    ],
)
def test_02_sizes_that_are_none(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, entries: dict[str, object], said: str
) -> None:
    """Refused by the plan, which takes memory for none of them."""
    edit_json(broken / "config.json", **entries)
    for more in ([], ["--dry-run"]):
        refused(llmpare, tiny.quantize(broken, out, text, *more), 3, "config.json", said)
    assert none(out)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"head_dim": 0},
        {"head_dim": 7},
        {"rms_norm_eps": "x"},
        {"rope_parameters": 3},
        {"tie_word_embeddings": "maybe"},
    ],
    ids=str,
)
def test_02_settings_that_transformers_refuses(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, entries: dict[str, object]
) -> None:
    edit_json(broken / "config.json", **entries)
    refused(llmpare, tiny.quantize(broken, out, text), 3, "config.json")
    assert none(out)


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
    assert took < 15, "a second for each of three commands, and patience with a busy machine"
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


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_13_tied_embeddings_stay_one_tensor(
    llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, form: str
) -> None:
    model = tiny.llama(tmp_path / "model", tied=True)
    assert llmpare(tiny.quantize(model, out, text, "--method", "rtn", "--format", form)).code == 0
    with Checkpoint.open(out) as checkpoint:
        outside = {name for name in checkpoint.tensors if ".layers." not in name}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight"}
    assert json.loads((out / "config.json").read_bytes())["tie_word_embeddings"] is True


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


CODES = "a\x1b[31m[/x]\n"


def test_18_hostile_tensor_name(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    write_shard(broken / "model.safetensors", {CODES: entry("F31", [2], 0, 8)}, 8)
    refused_by_all(llmpare, broken, out, text, 3, "a\\x1b[31m[/x]\\n", "unknown dtype 'F31'")


def test_18_hostile_architecture(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    edit_json(broken / "config.json", architectures=[CODES])
    refused(llmpare, tiny.quantize(broken, out, text), 3, "a\\x1b[31m[/x]\\n is not supported")
    assert none(out)
