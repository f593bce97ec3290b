import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LENGTH, TINY_LLAMA, request, save, write
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from llmpare.compress import hardware, memory
from llmpare.compress.errors import InputError, LlmpareError, MemoryLimitError, OutputError, UsageError
from llmpare.compress.plan import Plan, plan_quantize, within_room
from llmpare.compress.progress import Silent
from llmpare.compress.request import AUTO, NO_TEXT, PER_CHANNEL, LayerRule, Scheme, TextSpec
from llmpare.compress.run import run_quantize

GIB = 2**30


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies in every precision, whatever runs these tests."""
    monkeypatch.setattr(hardware, "multiplies", lambda dtype: True)


def plan(model: Path, out: Path = Path("out"), **changes: Any) -> Plan:
    return plan_quantize(request(model, out, **changes))


def refusal(error: type[LlmpareError], model: Path, out: Path = Path("out"), **changes: Any) -> str:
    with pytest.raises(error) as caught:
        plan(model, out, **changes)
    return f"{caught.value} | {caught.value.hint}"


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and bytes of every tensor in a folder, as the safetensors library reads them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, it is no mapping
                piece, tensor = shard.get_slice(name), shard.get_tensor(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()), tensor.nbytes)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan") / "llama", "llama")


# --- what a plan says


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


def test_rules_in_their_order(llama: Path) -> None:
    rules = (LayerRule(r"1\.mlp\.down", Scheme(8)), LayerRule("down", None), LayerRule("layers", Scheme(3)))
    schemes = {linear.name: scheme for linear, scheme in plan(llama, rules=rules).schemes.items()}
    assert schemes["model.layers.1.mlp.down_proj"] == Scheme(8)
    assert schemes["model.layers.0.mlp.down_proj"] is None
    assert schemes["model.layers.0.mlp.up_proj"] == Scheme(3)


@pytest.mark.parametrize("pattern", ["lm_head", "norm", "embed_tokens"])
def test_a_pattern_for_what_is_never_quantized_is_no_mistake(pattern: str, llama: Path) -> None:
    assert plan(llama, rules=(LayerRule(pattern, None),)).warnings == ()


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


# --- what is refused


def test_other_kinds_of_models_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    message = refusal(InputError, save(T5ForConditionalGeneration(t5), tmp_path / "t5"))
    assert message.startswith("architecture T5ForConditionalGeneration is not supported: it is an encoder-decoder")
    seeing = write(tmp_path / "seeing", "llama")
    edit(seeing, architectures=["Qwen2AudioForConditionalGeneration"], audio_config={"depth": 2})
    message = refusal(InputError, seeing)
    assert message.startswith(
        "architecture Qwen2AudioForConditionalGeneration is not supported: it has an audio_config"
    )


def test_conv1d_fits_two_of_the_formats(tmp_path: Path) -> None:
    model = write(tmp_path, "gpt2")
    message = refusal(InputError, model)
    assert message.startswith("compressed-tensors cannot store transformer.h.0.attn.c_attn: it is a Conv1D")
    assert message.endswith("use --format gptq or --format dense")
    assert len(plan(model, format="gptq").quantized) == len(plan(model, format="dense").quantized) == 8


@pytest.mark.parametrize(
    ("pattern", "siblings"),
    [("q_proj", "q_proj, k_proj, v_proj"), (r"[qk]_proj", "q_proj, k_proj, v_proj"), ("up_proj", "gate_proj, up_proj")],
)
@pytest.mark.parametrize("scheme", [None, Scheme(8)], ids=["dense", "W8A16"])
def test_what_servers_join_is_not_divided(pattern: str, siblings: str, scheme: Scheme | None, llama: Path) -> None:
    message = refusal(InputError, llama, rules=(LayerRule(pattern, scheme),))
    assert "have different schemes, but servers join them into one matrix" in message
    assert message.endswith(f"let one pattern match all of {siblings}")


def test_joined_matrices_may_differ_from_block_to_block(llama: Path) -> None:
    rules = (LayerRule(r"0\.self_attn\.[qkv]_proj", Scheme(8)), LayerRule(r"1\.mlp\.(gate|up)_proj", None))
    assert set(plan(llama, rules=rules).schemes.values()) == {Scheme(), Scheme(8), None}


@pytest.mark.parametrize(
    ("hidden", "inner", "asked", "fit"), [(128, 192, 128, 64), (128, 96, 64, 32), (128, 96, 128, 32), (72, 144, 32, -1)]
)
def test_groups_that_do_not_divide(hidden: int, inner: int, asked: int, fit: int, tmp_path: Path) -> None:
    settings = {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 32, "num_hidden_layers": 3}
    model = write(tmp_path, "llama", settings=settings)
    message = refusal(InputError, model, scheme=Scheme(4, asked))
    assert f"model.layers.0.mlp.down_proj [{hidden}, {inner}]" in message
    if hidden % asked:
        assert f"model.layers.0.mlp.gate_proj [{inner}, {hidden}]" in message
        assert " and 13 more | " in message  # o_proj has 128 inputs
    assert f"--group-size {fit} divides all of them" in message
    assert "--ignore" in message
    regrouped = plan(model, scheme=Scheme(4, fit))
    assert f"divides all of them, {regrouped.linear_bits:.2f} bits per weight" in message
    ignored = LayerRule("mlp|self_attn.[qkv]" if hidden % asked else "down_proj", None)
    partly = plan(model, scheme=Scheme(4, asked), rules=(ignored,))
    weights = sum(linear.rows * linear.columns for linear in partly.layout.linears)
    packed = sum(linear.rows * linear.columns for linear in partly.quantized)
    bits = (packed * partly.linear_bits + (weights - packed) * 16) / weights
    assert f"with --ignore, {bits:.2f} bits" in message
    fitted = plan(model, scheme=Scheme(4, AUTO))
    assert f"auto takes the largest for each, {fitted.linear_bits:.2f} bits" in message
    for linear, scheme in fitted.quantized.items():
        fits = [size for size in (128, 64, 32) if linear.columns % size == 0]
        assert scheme == Scheme(4, fits[0] if fits else PER_CHANNEL)


def test_fitted_groups_that_a_format_cannot_store(tmp_path: Path) -> None:
    """gptq knows one group size; loaders of compressed-tensors want one for all experts."""
    llama = write(tmp_path / "llama", "llama", settings={"intermediate_size": 192})
    assert "stores one scheme per model" in refusal(InputError, llama, scheme=Scheme(4, AUTO), format="gptq")
    assert plan(tmp_path / "llama", scheme=Scheme(4, AUTO), rules=(LayerRule("down", None),), format="gptq")
    mixture = write(tmp_path / "moe", "qwen3_moe", settings={"moe_intermediate_size": 192})
    assert "here they are W4A16 g128, W4A16 g64" in refusal(InputError, mixture, scheme=Scheme(4, AUTO))


def test_groups_are_looked_at_scheme_by_scheme(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", settings={"intermediate_size": 192})
    assert plan(model, rules=(LayerRule("down_proj", Scheme(4, 64)),))
    assert "down_proj [128, 192]" in refusal(InputError, model, rules=(LayerRule("o_proj", Scheme(8, 64)),))


def test_gptq_wants_whole_words(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", settings={"hidden_size": 72, "num_hidden_layers": 1})
    message = refusal(InputError, model, format="gptq", scheme=Scheme(4, PER_CHANNEL))
    assert "packs 32 values at a time" in message
    assert "gate_proj [256, 72]" in message


def test_gptq_holds_one_scheme(llama: Path) -> None:
    rules = (LayerRule("down_proj", Scheme(8, 128)),)
    assert "this run asks for W4A16 g128, W8A16 g128" in refusal(InputError, llama, format="gptq", rules=rules)


def test_a_model_that_is_quantized_already(tmp_path: Path) -> None:
    model = edit(write(tmp_path, "llama"), quantization_config={"quant_method": "bitsandbytes"})
    message = refusal(InputError, model)
    assert "already quantized" in message
    assert "'bitsandbytes'" in message


def test_code_in_the_model_folder_is_not_run_unasked(tmp_path: Path) -> None:
    model = edit(write(tmp_path, "llama"), auto_map={"AutoModelForCausalLM": "modeling.Novel"})
    message = refusal(InputError, model)
    assert "runs code from the model folder" in message
    assert "--trust-remote-code" in message
    assert plan(model, trust_remote_code=True)


def test_nothing_left_to_quantize(llama: Path) -> None:
    assert "no linear is left to quantize" in refusal(InputError, llama, rules=(LayerRule("layers", None),))


def test_methods_that_need_text(llama: Path) -> None:
    message = refusal(UsageError, llama, calibration=TextSpec(NO_TEXT))
    assert message == "--method gptq needs calibration text | give a --dataset, or use --method rtn"
    assert plan(llama, method="rtn", calibration=TextSpec(NO_TEXT)).needs.tokens == 0


def test_places_that_overlap(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama.parent)
    (llama.parent / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "down").symlink_to(llama.parent / "deep" / "deeper")
    around = tmp_path / "down" / ".." / ".."  # by way of a link, so not tmp_path itself
    for out in (
        llama,
        llama / "w4",
        llama.parent,
        llama.parent.parent,
        tmp_path / "link" / "llama" / "w4",
        llama.parent / "deep" / "..",
        around,
        around / "llama" / "w4",
    ):
        assert "lie inside each other" in refusal(UsageError, llama, out)
    assert plan(llama, llama.parent / "llama-w4")


def test_names_that_are_not_there(llama: Path) -> None:
    assert "did you mean compressed-tensors?" in refusal(UsageError, llama, format="compressed-tensor")
    with pytest.raises(UsageError, match="unknown method 'gtpq'"):
        plan_quantize(replace(request(llama, Path("out")), method="gtpq"))


# --- memory and disk


def test_enough_room(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out")
    assert within_room(planned, planned.needs.memory).needs.way.lines() == []
    limited = plan(llama, tmp_path / "out", max_memory=planned.needs.memory)
    assert within_room(limited, 64 * GIB).needs.memory == planned.needs.memory


def test_less_room_is_done_with_until_nothing_more_can_be_given_up(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out", calibration=TextSpec(nsamples=4096, seqlen=256))
    least = planned.needs.least
    assert least < planned.needs.memory / 2
    ways = []
    for room in (planned.needs.memory - 1, least):
        fitted = within_room(planned, room)
        assert fitted.needs.memory <= room
        assert fitted.specs == planned.specs
        assert fitted.sequential == planned.sequential
        ways.append(fitted.needs.way)
    assert not ways[-1].kept
    assert fitted.needs.spilled >= 4096 * 256 * 64 * 2
    with pytest.raises(MemoryLimitError, match="there is .* available") as caught:
        within_room(planned, least - 1)
    assert f"needs at least {memory.show(least)}" in str(caught.value)
    assert "larger machine" in caught.value.hint


def test_a_limit_is_a_limit(llama: Path, tmp_path: Path) -> None:
    planned = plan(llama, tmp_path / "out", max_memory=2**20)
    with pytest.raises(MemoryLimitError, match=r"there is --max-memory 1 MiB") as caught:
        within_room(planned, 64 * GIB)
    assert "--max-memory" in caught.value.hint


def test_disk_for_what_memory_has_no_room_for(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(llama, tmp_path / "out", calibration=TextSpec(nsamples=4096, seqlen=256))
    monkeypatch.setattr("llmpare.compress.plan.disk_free", lambda out: planned.file_bytes + 2**20)
    within_room(planned, planned.needs.memory)
    with pytest.raises(OutputError, match="hidden states .* need .* of disk"):
        within_room(planned, planned.needs.least)


def test_too_little_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(llama, tmp_path / "deep" / "out")
    asked: list[Path] = []

    def free(out: Path) -> int:
        asked.append(out)
        return planned.file_bytes - 1

    monkeypatch.setattr("llmpare.compress.plan.disk_free", free)
    with pytest.raises(OutputError, match="the output needs .* of disk") as caught:
        within_room(planned, 64 * GIB)
    assert str(tmp_path / "deep" / "out") in str(caught.value)
    assert "-o" in caught.value.hint
    assert asked == [tmp_path / "deep" / "out"]


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
