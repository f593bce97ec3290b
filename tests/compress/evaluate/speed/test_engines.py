from pathlib import Path

import pytest
import tiny

from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate.speed import engines
from llmpare.compress.evaluate.speed.cases import VARIATIONS
from llmpare.compress.evaluate.speed.check import check


def test_what_every_engine_lists_exists() -> None:
    for entry in engines.ENGINES.values():
        assert set(entry.variations) <= VARIATIONS.keys()
        path = Path(engines.__file__).parent / f"{entry.module.rpartition('.')[2]}.py"
        assert "\ndef load(job: Job)" in path.read_text(encoding="utf-8")


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="unknown engine 'transformer'") as caught:
        engines.find("transformer", tiny.EXAMPLE)
    assert caught.value.hint == "did you mean transformers? --engines takes transformers, vllm, onnxruntime, llama.cpp"


@pytest.mark.parametrize(
    ("name", "package"), [("vllm", "vllm"), ("onnxruntime", "onnxruntime-genai"), ("llama.cpp", "llama-cpp-python")]
)
def test_a_missing_engine_is_refused_with_the_line_that_installs_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"the engine {name} is not installed") as caught:
        check(tiny.EXAMPLE, [name])
    assert f"pip install {package}" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("transformers", ["model.gguf"]),
        ("vllm", ["config.json"]),
        ("onnxruntime", ["config.json", "model.safetensors"]),
        ("llama.cpp", ["config.json", "model.safetensors"]),
        ("llama.cpp", ["one.gguf", "two.gguf"]),
    ],
)
def test_a_checkpoint_that_does_not_suit_is_refused(
    name: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: "found")
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=f"the engine {name} cannot run"):
        check(tmp_path, [name])


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("transformers", ["config.json", "model.safetensors"]),
        ("vllm", ["config.json", "model-00001-of-00002.safetensors"]),
        ("onnxruntime", ["genai_config.json", "model.onnx"]),
        ("llama.cpp", ["model.gguf"]),
    ],
)
def test_a_checkpoint_that_suits_is_not(
    name: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: "found")
    for file in files:
        (tmp_path / file).touch()
    check(tmp_path, [name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engines": []}, "no engine"),
        ({"variations": ["dynamic"]}, "unknown variation 'dynamic'"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [0]}, "no prompt"),
        ({"batches": []}, "no batch"),
        ({"batches": [1, 0]}, "no batch"),
        ({"new_tokens": 1}, "--new-tokens 1"),
        ({"repeats": 0}, "--repeats 0"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(settings: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(tiny.EXAMPLE, **{"engines": ["transformers"], **settings})  # type: ignore[arg-type]
