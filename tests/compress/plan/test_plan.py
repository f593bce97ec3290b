"""What a plan says, against what the run then writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LENGTH, TINY_LLAMA, request, write
from plans import GIB, plan, refusal
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from llmpare.compress import memory
from llmpare.compress.errors import UsageError
from llmpare.compress.plan import plan_quantize
from llmpare.compress.progress import Silent
from llmpare.compress.request import NO_TEXT, PER_CHANNEL, LayerRule, Scheme, TextSpec
from llmpare.compress.run import run_quantize


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and bytes of every tensor in a folder, as the safetensors library reads them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, it is no mapping
                piece, tensor = shard.get_slice(name), shard.get_tensor(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()), tensor.nbytes)
    return found


OUTPUTS: dict[str, tuple[Scheme, str]] = {
    "llama": (Scheme(4, 128), "lm_head"),
    "qwen2": (Scheme(3, 32, False), "down_proj"),
    "mistral": (Scheme(8, PER_CHANNEL), "self_attn"),
    "gpt_neox": (Scheme(2, 64), r"layers\.0"),
    "gpt2": (Scheme(4, 64, False), "mlp"),
}
FORMS = ("compressed-tensors", "gptq", "dense")


@pytest.mark.parametrize(
    ("family", "form"), [(n, f) for n in OUTPUTS for f in FORMS if (n, f) != ("gpt2", "compressed-tensors")]
)
def test_the_output_is_what_was_planned(family: str, form: str, tmp_path: Path) -> None:
    """Every tensor: name, type, shape and bytes; and the size that the report states."""
    model, (scheme, pattern) = write(tmp_path / "model", family), OUTPUTS[family]
    asked = request(
        model,
        tmp_path / "out",
        format=form,
        scheme=scheme,
        rules=(LayerRule(pattern, None),),
        method="rtn",
        calibration=TextSpec(NO_TEXT),
    )
    planned = plan_quantize(asked)
    report = run_quantize(asked, Silent())
    stored = headers(tmp_path / "out")
    assert {spec.name: (spec.dtype, tuple(spec.shape), spec.nbytes) for spec in planned.specs} == stored
    assert planned.output_bytes == sum(size for _, _, size in stored.values()) == report["size"]["output_bytes"]
    assert planned.source_bytes == sum(size for _, _, size in headers(model).values()) == report["size"]["source_bytes"]

    replacing = (
        set(stored) - set(headers(model)) if form != "dense" else {linear.weight for linear in planned.quantized}
    )
    assert planned.linear_bytes == sum(stored[name][2] for name in replacing)
    weights = sum(linear.rows * linear.columns for linear in planned.quantized)
    assert planned.linear_bits == pytest.approx(8 * planned.linear_bytes / weights)
    for index, names in enumerate(planned.layout.blocks):
        kept = {name for name in names if name in stored}
        assert kept <= set(planned.specs_of(index))
        assert all(f".{index}." in name for name in planned.specs_of(index))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_four_bits_stay_close_to_four(form: str) -> None:
    planned = plan(TINY_LLAMA, format=form, scheme=Scheme(4, 128))
    assert 4 < planned.linear_bits <= 4.26
    assert planned.output_bytes < 0.45 * planned.source_bytes


def test_every_tensor_has_a_fate(llama: Path) -> None:
    rules = (LayerRule("down_proj", None), LayerRule("o_proj", Scheme(8, 64)))
    told = plan(llama, rules=rules).to_json()
    assert json.loads(json.dumps(told)) == told
    fates = {each["name"]: each for each in told["tensors"]}
    assert len(fates) == len(told["tensors"])
    assert {name: (each["dtype"], tuple(each["shape"])) for name, each in fates.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in headers(llama).items()
    }
    expected = {"down": "dense, as asked", "o_p": "W8A16 g64", "norm": "copied", "embed": "copied", "lm_h": "copied"}
    for name, each in fates.items():
        assert each["fate"] == next((fate for part, fate in expected.items() if part in name), "W4A16 g128")
    assert {name: value for name, value in told.items() if name != "tensors"} == {
        "command": "plan",
        "model": str(llama),
        "architecture": "LlamaForCausalLM",
        "source_scheme": "dense",
        "blocks": 2,
        "format": "compressed-tensors",
        "method": "gptq",
        "linear_bits_per_weight": pytest.approx(plan(llama, rules=rules).linear_bits, abs=1e-4),
        "source_bytes": sum(size for _, _, size in headers(llama).values()),
        "output_bytes": plan(llama, rules=rules).output_bytes,
        "memory_bytes": plan(llama, rules=rules).needs.memory,
        "least_memory_bytes": plan(llama, rules=rules).needs.least,
        "file_bytes": plan(llama, rules=rules).file_bytes,
        "disk_bytes": plan(llama, rules=rules).file_bytes,
        "warnings": [],
    }


def test_lines_for_people(llama: Path) -> None:
    planned = plan(llama, rules=(LayerRule("0.mlp.down_proj", None), LayerRule("nowhere", None)))
    lines = planned.lines()
    assert lines[0] == f"LlamaForCausalLM, 2 blocks, {planned.parameters:,} parameters"
    counted = {}
    for line in lines[2 : lines.index("", 2)]:
        count, _, rest = line.partition(" × ")
        name, *_, fate = rest.split("  ")
        counted[name, fate.rpartition("→ ")[2]] = int(count)
    assert sum(counted.values()) == len(headers(llama))
    assert counted["model.layers.*.self_attn.q_proj.weight", "W4A16 g128"] == 2
    assert counted["model.layers.*.mlp.down_proj.weight", "dense, as asked"] == 1
    assert counted["model.layers.*.mlp.down_proj.weight", "W4A16 g128"] == 1
    assert counted["lm_head.weight", "copied"] == 1
    text = "\n".join(lines)
    assert f"{memory.show(planned.output_bytes)} from {memory.show(planned.source_bytes)}" in text
    assert f"about {memory.show(planned.needs.memory)}" in text
    assert f"{planned.file_bytes:,} bytes of weight files" in text
    assert lines[-1] == "note     pattern 'nowhere' matches no linear"


@pytest.mark.parametrize("pattern", ["lm_head", "^lm_head$", "embed_tokens", "model.norm"])
def test_a_rule_for_what_is_outside_the_blocks(llama: Path, pattern: str) -> None:
    """It may ask for what happens anyway, and for nothing else."""
    assert plan(llama, rules=(LayerRule(pattern, None),)).warnings == ()
    said = refusal(UsageError, llama, rules=(LayerRule(pattern, Scheme(8)),))
    assert "only linears inside the blocks are quantized" in said
    assert repr(pattern) in said


def test_a_rule_for_everything_means_all_linears(llama: Path) -> None:
    planned = plan(llama, rules=(LayerRule(".", Scheme(8)),))
    assert set(planned.schemes.values()) == {Scheme(8)}


def test_notes_of_the_format_are_passed_on(llama: Path) -> None:
    (note,) = plan(llama, scheme=Scheme(4, 128, False)).warnings
    assert "dequantize=True" in note


def test_lengths_and_precision(llama: Path) -> None:
    planned = plan(llama, calibration=TextSpec())
    assert (planned.seqlen, planned.longest, planned.vocabulary, planned.dtype) == (256, 256, 4096, "BF16")
    assert plan(llama).seqlen == LENGTH
    assert plan(llama, dtype="float32").dtype == "F32"
    message = refusal(UsageError, llama, dtype="float8")
    assert "unknown dtype 'float8' | --dtype takes auto, float32, float16, bfloat16" in message


def test_the_precision_of_most_weights(tmp_path: Path) -> None:
    planned = plan(write(tmp_path, "mistral"))
    assert planned.dtype == "F32"
    assert plan(write(tmp_path / "half", "opt")).dtype == "F16"


def test_planning_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmpare.compress.plan import plan_quantize;"
        "from llmpare.compress.request import QuantizeRequest;"
        "plan_quantize(QuantizeRequest(sys.argv[1], Path('out'))).lines();"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_plans_are_quick_for_large_models(tmp_path: Path) -> None:
    """Headers are all that is read: the numbers of a 70B model, in a file that holds none of them."""
    settings = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 80,
    }
    config = AutoConfig.for_model("llama", **settings, vocab_size=128256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    planned = plan(tmp_path, calibration=TextSpec(nsamples=128, seqlen=2048))
    assert planned.parameters == 70_553_706_496
    assert len(planned.quantized) == 560
    assert 4.12 < planned.linear_bits < 4.13
    assert 35 * GIB < planned.output_bytes < 38 * GIB
    assert 5 * GIB < planned.needs.least < planned.needs.memory < planned.source_bytes / 2
