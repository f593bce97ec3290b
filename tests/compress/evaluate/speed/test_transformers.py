import json
from dataclasses import replace
from pathlib import Path

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from llmpare.cli.exits import main
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.speed import prompts, roofline
from llmpare.compress.evaluate.speed.engine import Case, Job
from llmpare.compress.evaluate.speed.engines import transformers as adapter
from llmpare.compress.evaluate.speed.engines.transformers import DENSE, STORED, TransformersEngine, load

WEIGHT = "model.layers.0.mlp.down_proj.weight"
CASE = Case(batch=3, prompt=12, new_tokens=6)


def job(model: Path) -> Job:
    return Job("transformers", model, "cpu", "float32", False, (CASE,), 1, None, 60.0)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load(job(tiny.EXAMPLE))


@pytest.fixture(scope="module")
def texts(engine: TransformersEngine) -> list[list[int]]:
    return prompts.equal(engine.vocabulary, CASE.batch, CASE.prompt)


@pytest.fixture(scope="module")
def textbook(engine: TransformersEngine, texts: list[list[int]]) -> list[list[int]]:
    """The whole sequence again for every token, one sequence at a time."""
    found = []
    for text in texts:
        ids = list(text)
        for _ in range(CASE.new_tokens):
            with torch.no_grad():
                ids.append(int(engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(text) :])
    return found


@pytest.mark.parametrize(
    "change",
    [{}, {"cache": "static"}, {"cache": "off"}, {"attention": "eager"}, {"continuous": True, "cache": "paged"}],
    ids=["dynamic", "static", "off", "eager", "continuous"],
)
def test_every_way_to_run_it_gives_the_same_tokens(
    engine: TransformersEngine, texts: list[list[int]], textbook: list[list[int]], change: dict[str, object]
) -> None:
    case = replace(CASE, **change)  # type: ignore[arg-type]
    for _ in range(2):  # a cache that is kept must be emptied
        run = engine.generate(case, texts)
        assert run.tokens == textbook
        assert run.decode > 0
        assert len(run.steps) == (0 if case.continuous else CASE.new_tokens - 1)
        assert run.decode == pytest.approx(sum(run.steps)) or case.continuous
    engine.release()


def test_flash_attention_is_refused_where_it_cannot_run(engine: TransformersEngine) -> None:
    assert engine.refuses(replace(CASE, attention="flash_attention_2")) == "flash attention needs CUDA"
    assert engine.refuses(CASE) == ""


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_attention_that_a_model_does_not_know_is_not_claimed(tmp_path: Path, family: str) -> None:
    engine = load(job(families.write(tmp_path, family)))
    assert engine.attention == "eager"
    with pytest.raises((InputError, ValueError), match="attention"):
        engine.generate(replace(CASE, attention="sdpa"), prompts.equal(engine.vocabulary, 3, 12))


def test_what_it_says_of_the_model(engine: TransformersEngine) -> None:
    assert (engine.weights, engine.attention) == (STORED, "sdpa")
    assert engine.longest == 1024
    assert set(engine.vocabulary) == set(range(2, 4096))
    assert engine.work.weight_bytes >= 4 * sum(p.numel() for p in engine.model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_operations_of_a_step_are_those_torch_counts(tmp_path: Path, tied: bool) -> None:
    model = load(job(tiny.llama(tmp_path / "model", tied=tied)))
    case = Case(batch=2, prompt=7, new_tokens=2, attention="eager")
    texts = prompts.equal(model.vocabulary, 2, 7)
    model.generate(case, texts)
    with FlopCounterMode(display=False) as whole:
        model.generate(case, texts)
    with FlopCounterMode(display=False) as prefill:
        model.generate(replace(case, new_tokens=1), texts)
    step = whole.get_total_flops() - prefill.get_total_flops()
    rotary = 2 * 2 * (tiny.HIDDEN // tiny.HEADS // 2)  # frequencies times positions, which transformers multiplies
    assert step == pytest.approx(roofline.operations(model.work, 2, 1, 7), abs=2 * rotary)
    table = 4 * tiny.VOCABULARY * tiny.HIDDEN
    assert model.work.read_bytes is not None
    assert model.work.weight_bytes - model.work.read_bytes == (0 if tied else table)


@pytest.mark.parametrize("stored", ["compressed-tensors", "gptq"])
def test_codes_that_no_package_runs_are_decoded_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    dense, packed = tiny.llama(tmp_path / "model"), tmp_path / "packed"
    command = tiny.quantize(dense, packed, tiny.texts(tmp_path), "--method", "rtn", "--format", stored, "--quiet")
    assert main(command) == 0
    before, after = load(job(dense)), load(job(packed))
    assert (before.weights, after.weights) == (STORED, DENSE)
    assert after.work == before.work
    texts = prompts.equal(after.vocabulary, CASE.batch, CASE.prompt)
    run = after.generate(CASE, texts)
    assert run.tokens == after.generate(replace(CASE, cache="off"), texts).tokens
    assert not torch.equal(before.model.get_parameter(WEIGHT), after.model.get_parameter(WEIGHT))


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers then computes with the codes")
def test_codes_that_transformers_decodes_are_not_called_stored(tmp_path: Path) -> None:
    """FP8 needs a GPU that multiplies in it; without one transformers loads dense weights."""
    folder = tiny.llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj" in name]:
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)
        weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [4096, 4096]}
    config = json.loads((folder / "config.json").read_bytes()) | {"quantization_config": stored}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(job(folder)).weights == DENSE
