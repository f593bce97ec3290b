"""Faults that `llmpare evaluate` can meet, at the level of the command line: exit code, what stderr says, the disk."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llmpare.cli import exits
from llmpare.compress import activations
from llmpare.compress.model.replay import Replay
from llmpare.compress.streams import Stream

Llmpare = Callable[..., tiny.Ended]


@pytest.fixture
def llmpare(capsys: pytest.CaptureFixture[str]) -> Llmpare:
    """The command line, in this process."""

    def call(*arguments: str | Path) -> tiny.Ended:
        code = exits.main([str(each) for each in arguments])
        said = capsys.readouterr()
        assert "a bug in llmpare" not in said.err, said.err
        return tiny.Ended(code, said.out, said.err)

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, which no test may change."""
    return tiny.llama(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.texts(tmp_path_factory.mktemp("text"))[1]


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the sound model, to be broken."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report"


def command(model: Path, text: Path, *more: str | Path) -> list[str | Path]:
    return ["evaluate", model, "--text", text, "--nsamples", "3", "--seqlen", "32", "--device", "cpu", *more]


def refused(ended: tiny.Ended, out: Path, code: int, *said: str) -> None:
    """It failed with that code, said all that, and left nothing behind."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    for part in said:
        assert part in ended.err, (part, ended.err)
    assert not out.exists()


def test_baseline_missing(llmpare: Llmpare, model: Path, text: Path, out: Path, tmp_path: Path) -> None:
    ended = llmpare(*command(model, text, "-o", out, "--baseline", tmp_path / "none"))
    refused(ended, out, 2, "--baseline: ", "none' does not exist: expected a folder with config.json")


def test_model_missing(llmpare: Llmpare, model: Path, text: Path, out: Path, tmp_path: Path) -> None:
    ended = llmpare(*command(tmp_path / "none", text, "-o", out, "--baseline", model))
    refused(ended, out, 2, "none' does not exist: expected a folder with config.json")


def test_a_model_twice(llmpare: Llmpare, model: Path, text: Path, out: Path) -> None:
    refused(llmpare(*command(model, text, model, "-o", out)), out, 2, "is named twice")


def test_vocabulary_mismatch(llmpare: Llmpare, model: Path, broken: Path, text: Path, out: Path) -> None:
    content = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[1000:1002]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (broken / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ended = llmpare(*command(broken, text, "-o", out, "--baseline", model))
    refused(ended, out, 3, "have different vocabularies: id 1", "2 ids differ", "hint: ")


def test_no_tokenizer_anywhere(llmpare: Llmpare, broken: Path, text: Path, out: Path) -> None:
    (broken / "tokenizer.json").unlink()
    refused(llmpare(*command(broken, text, "-o", out)), out, 3, "no tokenizer in the model folder")


def test_no_tokenizer_of_its_own(llmpare: Llmpare, model: Path, broken: Path, text: Path, out: Path) -> None:
    (broken / "tokenizer.json").unlink()
    ended = llmpare(*command(broken, text, "-o", out, "--baseline", model))
    assert ended.code == 0
    assert "has no tokenizer, that of" in ended.err
    assert llmpare(*command(broken, text, "-o", out, "--baseline", model, "--strict")).code == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_no_numbers(
    llmpare: Llmpare, model: Path, text: Path, out: Path, tmp_path: Path, value: float
) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = value
        return weight

    spoiled = tiny.llama(tmp_path / "spoiled", changes={"model.layers.1.mlp.down_proj.weight": spoil})
    ended = llmpare(*command(spoiled, text, "-o", out, "--baseline", model))
    assert ended.code == 4
    assert "the activations of block 1 are NaN or infinite in torch.float32" in ended.err
    assert "perplexity is not finite, first at window 0, position 0" in ended.err
    assert "not finite" in ended.err.splitlines()[-2]
    report = json.loads((out / "report.json").read_bytes())
    assert report["passed"] is report["candidates"][0]["passed"] is False
    assert report["candidates"][0]["fidelity"]["perplexity"]["compressed"] is None


def test_a_baseline_that_gives_no_numbers(llmpare: Llmpare, model: Path, text: Path, tmp_path: Path) -> None:
    spoiled = tiny.llama(tmp_path / "spoiled", changes={"lm_head.weight": lambda weight: weight * math.nan})
    ended = llmpare(*command(model, text, "--baseline", spoiled, "--json"))
    assert ended.code == 4
    assert json.loads(ended.out)["candidates"][0]["fidelity"]["perplexity"]["dense"] is None


@pytest.mark.parametrize("content", ["", " \n\n "])
def test_text_empty(llmpare: Llmpare, model: Path, out: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    refused(llmpare(*command(model, tmp_path / "empty.txt", "-o", out)), out, 3, "no text, 0 tokens, and 96 are needed")


def test_text_too_short(llmpare: Llmpare, model: Path, text: Path, out: Path) -> None:
    ended = llmpare(*command(model, text, "-o", out, "--nsamples", "900"))
    refused(ended, out, 3, "tokens, and 900 windows of 32 need 28800")


def test_text_missing(llmpare: Llmpare, model: Path, out: Path) -> None:
    refused(llmpare(*command(model, Path("./none.txt"), "-o", out)), out, 2, "none.txt: no such file")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "is truncated"),
        (only_pickle, "pickle is not loaded"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (edited(num_hidden_layers=7), "config.json promises 7 blocks, the weights hold 2"),
        (edited(hidden_size=32), "config.json implies"),
        (edited(model_type="nonesuch"), "nonesuch"),
        (edited(auto_map={"AutoModel": "code.Model"}), "runs code from the model folder"),
        (edited(quantization_config={"quant_method": "nonesuch"}), "nonesuch"),
    ],
)
def test_a_model_that_does_not_load(
    llmpare: Llmpare, broken: Path, text: Path, out: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(broken)
    refused(llmpare(*command(broken, text, "-o", out)), out, 3, said)


def test_report_at_a_place_that_is_no_folder(llmpare: Llmpare, model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = llmpare(*command(model, text, "-o", tmp_path / "file"))
    assert ended.code == 5
    assert (tmp_path / "file").read_text() == "mine"


def test_report_in_a_model(llmpare: Llmpare, model: Path, text: Path) -> None:
    before = tiny.contents(model)
    ended = llmpare(*command(model, text, "-o", model))
    assert ended.code == 5
    assert "holds 'config.json'" in ended.err
    assert tiny.contents(model) == before


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_an_earlier_report_that_is_none(
    llmpare: Llmpare, model: Path, text: Path, out: Path, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "old.json").write_text(content)
    refused(llmpare(*command(model, text, "-o", out, "--against", tmp_path / "old.json")), out, 3, "old.json")


def test_device_memory(llmpare: Llmpare, model: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stream, "advance", full)
    refused(llmpare(*command(model, text, "-o", out)), out, 6, "the device ran out of memory", "--seqlen")


def test_half_the_windows_fit_into_device_memory(
    llmpare: Llmpare, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is then that of a run with as many windows at a time from the start, to rounding."""
    assert llmpare(*command(model, text, "-o", tmp_path / "plenty")).code == 0
    real = Replay.run

    def scarce(self: Replay, index: int, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, index, hidden, *more)

    monkeypatch.setattr(Replay, "run", scarce)
    monkeypatch.setattr(activations, "batch_tokens", lambda device: 4 * 32)
    ended = llmpare(*command(model, text, "-o", tmp_path / "scarce"))
    assert ended.code == 0
    assert "ran out of memory with 4 windows at a time, trying 2" in ended.err
    plenty, scarce_ = (
        json.loads((tmp_path / name / "report.json").read_bytes())["candidates"][0]["fidelity"]
        for name in ("plenty", "scarce")
    )
    assert scarce_["perplexity"]["compressed"] == pytest.approx(plenty["perplexity"]["compressed"], rel=1e-5)


LIMIT = 150 * 2**20  # bytes of data beyond what an interpreter with everything imported has


def large(folder: Path, blocks: int) -> int:
    """A model of `blocks` blocks of 17 MB, all zeros but for its embeddings: a file with holes. Returns its bytes."""
    wide = {"hidden_size": 512, "intermediate_size": 2048}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (tiny.VOCABULARY, 512), "model.norm": (512,)}
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes[f"{block}.input_layernorm"] = shapes[f"{block}.post_attention_layernorm"] = (512,)
        rows = {"q": 512, "k": 256, "v": 256, "o": 512}
        shapes |= {f"{block}.self_attn.{name}_proj": (count, 512) for name, count in rows.items()}
        shapes |= {f"{block}.mlp.{name}_proj": (2048, 512) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (512, 2048)
    folder.mkdir()
    config = tiny.config(blocks=blocks, tied=True) | wide | {"head_dim": 256}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, folder / name)
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = file.tell()
        file.write(torch.randn(tiny.VOCABULARY, 512, generator=torch.Generator().manual_seed(0)).numpy().tobytes())
        file.truncate(start + place)
    return place


def test_a_model_larger_than_the_memory_there_is(text: Path, tmp_path: Path) -> None:
    """The limit holds for everything the process allocates after its imports, and is smaller than the weights."""
    weights = large(tmp_path / "large", blocks=20)
    assert weights > 2 * LIMIT
    arguments = [str(each) for each in command(tmp_path / "large", text, "--quiet", "--json")]
    done = tiny.limited(arguments, LIMIT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["candidates"][0]
    assert found["size"]["bytes"] == weights
    assert math.isfinite(found["fidelity"]["perplexity"]["compressed"])
