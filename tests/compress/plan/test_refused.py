"""Models, methods and places that are refused before anything runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import request, save, write
from plans import plan, refusal
from transformers import T5Config, T5ForConditionalGeneration

from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.plan import plan_quantize
from llmpare.compress.request import NO_TEXT, TextSpec


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


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


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_model_that_is_quantized_already(key: str, tmp_path: Path) -> None:
    model = edit(write(tmp_path, "llama"), **{key: {"quant_method": "bitsandbytes"}})
    message = refusal(InputError, model)
    assert "already quantized" in message
    assert "'bitsandbytes'" in message


def test_code_in_the_model_folder_is_not_run_unasked(tmp_path: Path) -> None:
    model = edit(write(tmp_path, "llama"), auto_map={"AutoModelForCausalLM": "modeling.Novel"})
    message = refusal(InputError, model)
    assert "runs code from the model folder" in message
    assert "--trust-remote-code" in message
    assert plan(model, trust_remote_code=True)


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
