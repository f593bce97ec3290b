"""Whole evaluations of small models, through the library; what a shell sees of faults is in test_faults.py there."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from llmpare.cli.exits import main
from llmpare.compress.errors import InputError, MemoryLimitError, OutputError, UsageError
from llmpare.compress.evaluate import estimate, run
from llmpare.compress.evaluate import text as textual
from llmpare.compress.evaluate.baseline import Saver
from llmpare.compress.evaluate.estimate import Needs
from llmpare.compress.evaluate.request import EvaluateRequest, TasksRequest, TextRequest
from llmpare.compress.evaluate.run import run_evaluate
from llmpare.compress.progress import Silent
from llmpare.compress.report import schema
from llmpare.compress.request import Gates

WINDOWS = 5
NOISE = 0.05


def shaken(weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return weight * (1 + NOISE * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, and two models that are not quite it; a little text."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.llama(folder / "dense")
    for index in (0, 1):
        changes = {f"model.layers.{index}.mlp.{name}_proj.weight": shaken for name in ("gate", "up", "down")}
        tiny.llama(folder / f"shaken-{index}", changes=changes)
    tiny.texts(folder)
    return folder


@pytest.fixture(scope="module")
def text(place: Path) -> TextRequest:
    return TextRequest((str(place / "evaluation.txt"),), WINDOWS, tiny.WINDOW)


def evaluate(request: EvaluateRequest) -> dict[str, Any]:
    report = run_evaluate(request, Silent())
    assert schema.validate(json.loads(json.dumps(report))) == []
    return report


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[:, :-1].double()


def windows_of(place: Path, count: int = WINDOWS, length: int = tiny.WINDOW) -> torch.Tensor:
    """As everybody cuts them: all the text tokenized in one piece, bos in front, the first windows."""
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    content = (place / "evaluation.txt").read_text(encoding="utf-8")
    ids = [tokenizer.bos_token_id, *tokenizer(content, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids[: count * length]).view(count, length)


def textbook(place: Path, name: str) -> dict[str, Any]:
    """Every figure from transformers' own forward, in float64."""
    ids = windows_of(place)
    p, q = (torch.log_softmax(logits(place / each, ids), -1) for each in ("dense", name))
    kl = (p.exp() * (p - q)).sum(-1)
    dense, own = (-x.gather(-1, ids[:, 1:, None]).squeeze(-1) for x in (p, q))
    return {"kl": kl, "dense": dense, "own": own, "agree": (p.argmax(-1) == q.argmax(-1)).double()}


def test_figures_are_those_of_transformers_in_float64(place: Path, text: TextRequest) -> None:
    names = ("shaken-0", "shaken-1")
    request = EvaluateRequest(tuple(str(place / name) for name in names), str(place / "dense"), text=text)
    report = evaluate(request)
    assert report["passed"] is True
    assert [candidate["name"] for candidate in report["candidates"]] == list(names)
    for candidate in report["candidates"]:
        expected = textbook(place, candidate["name"])
        found = candidate["fidelity"]
        assert (found["tokens"], found["windows"], found["dtype"]) == (WINDOWS * (tiny.WINDOW - 1), WINDOWS, "float32")
        assert found["kl"]["mean"] == pytest.approx(float(expected["kl"].mean()), rel=1e-3)
        assert found["kl"]["max"] == pytest.approx(float(expected["kl"].max()), rel=1e-3)
        assert found["perplexity"]["dense"] == pytest.approx(math.exp(expected["dense"].mean()), rel=1e-4)
        assert found["perplexity"]["compressed"] == pytest.approx(math.exp(expected["own"].mean()), rel=1e-4)
        assert found["agreement"]["top1"] == pytest.approx(float(expected["agree"].mean()), abs=1e-9)
        first = candidate["worst"][0]
        assert first["kl"] == found["kl"]["max"]
        assert (first["window"], first["position"]) == divmod(int(expected["kl"].argmax()), tiny.WINDOW - 1)
        assert len(candidate["worst"]) == 20
        assert candidate["size"]["ratio"] == 1
    assert report["candidates"][0]["fidelity"]["kl"]["mean"] != report["candidates"][1]["fidelity"]["kl"]["mean"]


def test_the_worst_place_is_shown_as_text(place: Path, text: TextRequest) -> None:
    report = evaluate(EvaluateRequest((str(place / "shaken-0"),), str(place / "dense"), text=text))
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    ids = windows_of(place)
    for entry in report["candidates"][0]["worst"]:
        window, position = entry["window"], entry["position"]
        assert entry["context"] == tokenizer.decode(ids[window, : position + 1][-40:].tolist())
        assert entry["next"] == tokenizer.decode([int(ids[window, position + 1])])


def test_bits_per_byte_count_the_bytes_of_the_scored_tokens(place: Path, text: TextRequest) -> None:
    report = evaluate(EvaluateRequest((str(place / "dense"),), text=text))
    ids = windows_of(place)
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    whole = len(tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True).encode())
    unscored = sum(len(tokenizer.decode([int(token)], skip_special_tokens=True).encode()) for token in ids[:, 0])
    assert report["evaluation"]["scored_bytes"] == pytest.approx(whole - unscored, abs=3 * WINDOWS)
    found = report["candidates"][0]["fidelity"]
    bits = math.log2(found["perplexity"]["compressed"]) * found["tokens"] / report["evaluation"]["scored_bytes"]
    assert found["bits_per_byte"]["compressed"] == pytest.approx(bits)


def test_a_model_alone(place: Path, text: TextRequest) -> None:
    report = evaluate(EvaluateRequest((str(place / "dense"),), text=text, gates=Gates(max_size=10**9)))
    candidate = report["candidates"][0]
    assert report["baseline"] is candidate["fidelity"]["kl"] is candidate["size"]["ratio"] is None
    expected = math.exp(textbook(place, "dense")["own"].mean())
    assert candidate["fidelity"]["perplexity"]["compressed"] == pytest.approx(expected, rel=1e-4)
    assert [gate["name"] for gate in report["gates"]] == ["max-size"]


def test_a_model_against_itself(place: Path, text: TextRequest) -> None:
    limits = Gates(max_kl=0.0, max_perplexity_increase=0.0, min_agreement=1.0)
    model = str(place / "dense")
    report = evaluate(EvaluateRequest((model,), model, text=text, gates=limits))
    assert report["passed"] is True
    assert report["candidates"][0]["fidelity"]["kl"]["max"] == 0


def test_kinds_of_text_make_up_the_whole(place: Path) -> None:
    """The bundled text names them; each token belongs to one, so the means weigh up to that of all."""
    request = EvaluateRequest(
        (str(place / "shaken-0"),), str(place / "dense"), text=TextRequest(nsamples=60, seqlen=64)
    )
    candidate = evaluate(request)["candidates"][0]
    rows = candidate["domains"]
    assert {"dialogue", "code", "languages"} <= {row["name"] for row in rows}
    assert sum(row["tokens"] for row in rows) == candidate["fidelity"]["tokens"] == 60 * 63
    mean = sum(row["tokens"] * row["kl"] for row in rows) / candidate["fidelity"]["tokens"]
    assert mean == pytest.approx(candidate["fidelity"]["kl"]["mean"])
    nll = sum(row["tokens"] * math.log(row["perplexity"]["dense"]) for row in rows)
    assert math.exp(nll / (60 * 63)) == pytest.approx(candidate["fidelity"]["perplexity"]["dense"])


def test_several_files_are_kinds_of_their_own(place: Path) -> None:
    files = (str(place / "evaluation.txt"), str(place / "calibration.txt"))
    report = evaluate(EvaluateRequest((str(place / "dense"),), text=TextRequest(files, seqlen=tiny.WINDOW)))
    assert [row["name"] for row in report["candidates"][0]["domains"]] == ["calibration.txt", "evaluation.txt"]


def test_a_text_that_goes_on_is_a_warning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textual, "ENOUGH_TEXT", 1000)
    request = EvaluateRequest((str(place / "dense"),), text=TextRequest(seqlen=tiny.WINDOW))
    report = evaluate(request)
    tokens = report["evaluation"]["windows"] * tiny.WINDOW
    said = f"only the first {tokens:,} tokens of bundled are measured; --nsamples says how many"
    assert report["warnings"] == [said]
    assert evaluate(replace(request, text=replace(request.text, nsamples=2)))["warnings"] == []


def test_a_report_folder(place: Path, text: TextRequest, tmp_path: Path) -> None:
    request = EvaluateRequest((str(place / "shaken-0"),), str(place / "dense"), tmp_path / "report", text=text)
    report = evaluate(replace(request, junit=tmp_path / "ci" / "gates.xml"))
    assert tiny.names(tmp_path / "report") == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "report" / "report.json").read_bytes()) == json.loads(json.dumps(report))
    assert "`shaken-0`" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "<testsuites" in (tmp_path / "ci" / "gates.xml").read_text(encoding="utf-8")
    again = evaluate(replace(request, against=tmp_path / "report" / "report.json"))
    assert again["passed"] is True
    assert {"against-kl", "against-size"} <= {gate["name"] for gate in again["gates"]}
    worse = replace(request, models=(str(place / "shaken-1"),), against=tmp_path / "report" / "report.json")
    before = report["candidates"][0]["fidelity"]["kl"]["mean"]
    found = evaluate(worse)
    assert found["passed"] == (found["candidates"][0]["fidelity"]["kl"]["mean"] <= 1.2 * before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "bfloat16"}, "another precision"),
        ({"text": TextRequest(("calibration.txt",), WINDOWS, tiny.WINDOW)}, "another evaluation text"),
        ({"baseline": None}, "another original"),
        ({"baseline": "compared"}, "another part of its predictions: 'all tokens' in the earlier report"),
        ({"models": ("dense", "shaken-0")}, "no model 'dense'"),
    ],
    ids=["dtype", "text", "baseline", "kept", "models"],
)
def test_what_cannot_be_compared_is_refused_before_a_model_runs(
    place: Path,
    text: TextRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(place)
    request = EvaluateRequest(("shaken-0",), "dense", tmp_path / "report", text=text, dtype="float32")
    evaluate(replace(request, save_baseline=Path("compared")))
    monkeypatch.setattr(run, "_measure", None)
    with pytest.raises(InputError, match=said):
        evaluate(replace(request, against=tmp_path / "report" / "report.json", out=None, **change))


def test_by_default_models_run_in_the_precision_of_the_earlier_report(
    place: Path, text: TextRequest, tmp_path: Path
) -> None:
    """A report of a machine that multiplies in bfloat16 can be compared with on one that does not."""
    request = EvaluateRequest((str(place / "shaken-0"),), out=tmp_path / "report", text=text, dtype="bfloat16")
    evaluate(request)
    later = replace(request, out=None, dtype="auto", against=tmp_path / "report" / "report.json")
    report = evaluate(later)
    assert report["candidates"][0]["fidelity"]["dtype"] == "bfloat16"
    assert report["passed"] is True
    with pytest.raises(InputError, match="another precision: bfloat16 in the earlier report, float32") as caught:
        evaluate(replace(later, dtype="float32"))
    assert caught.value.hint == "give --dtype bfloat16"


def test_figures_that_only_the_earlier_report_has_are_a_warning(place: Path, text: TextRequest, tmp_path: Path) -> None:
    request = EvaluateRequest((str(place / "dense"),), out=tmp_path / "report", text=text)
    row = {"task": "gone", "metric": "acc", "higher_is_better": True, "value": 0.5, "stderr": 0.1}
    earlier = evaluate(request)
    earlier["candidates"][0]["tasks"] = {"rows": [row]}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    later = replace(request, out=None, against=tmp_path / "earlier.json")
    report = evaluate(later)
    assert report["passed"] is True
    assert report["warnings"] == ["only the earlier report has figures for against-gone-acc: they are not compared"]
    assert evaluate(replace(later, strict=True))["passed"] is False


def test_the_same_command_again_replaces_what_it_wrote(place: Path, text: TextRequest, tmp_path: Path) -> None:
    """The gates in the folder of the report, and what a kill left behind while the report was written."""
    out = tmp_path / "report"
    request = EvaluateRequest((str(place / "dense"),), out=out, text=text, junit=out / "junit.xml")
    evaluate(request)
    (out / ".report.json.tmp").write_text("{")
    evaluate(request)
    assert tiny.names(out) == ["junit.xml", "report.html", "report.json", "report.md"]
    with pytest.raises(OutputError, match="holds 'junit.xml'"):
        evaluate(replace(request, junit=None))


def test_a_folder_that_holds_something_else_is_left_alone(place: Path, text: TextRequest, tmp_path: Path) -> None:
    request = EvaluateRequest((str(place / "dense"),), text=text)
    with pytest.raises(OutputError, match="holds 'config.json'"):
        evaluate(replace(request, out=Path(shutil.copytree(place / "dense", tmp_path / "model"))))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"command": "quantize"}')
    with pytest.raises(OutputError, match="another command"):
        evaluate(replace(request, out=tmp_path / "other"))


# --- saved baselines


@pytest.fixture(scope="module")
def saved(place: Path, text: TextRequest) -> Path:
    evaluate(EvaluateRequest((str(place / "dense"),), text=text, save_baseline=place / "kept", top_k=500))
    return place / "kept"


def test_a_saved_baseline_gives_a_lower_bound_close_by(place: Path, text: TextRequest, saved: Path) -> None:
    model = (str(place / "shaken-0"),)
    exact = evaluate(EvaluateRequest(model, str(place / "dense"), text=text))
    found = evaluate(EvaluateRequest(model, str(saved), text=text))
    a, b = (report["candidates"][0]["fidelity"] for report in (exact, found))
    assert 0.3 * a["kl"]["mean"] < b["kl"]["mean"] <= a["kl"]["mean"]
    assert b["agreement"] == pytest.approx(a["agreement"])
    assert b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-6)
    assert b["bits_per_byte"] == pytest.approx(a["bits_per_byte"])
    assert found["baseline"]["saved"] == {"folder": str(saved), "top_k": 500}
    for key in ("model", "weights_sha256", "weight_bytes"):
        assert found["baseline"][key] == exact["baseline"][key]


def test_saving_beside_a_comparison_gives_the_same_files(place: Path, text: TextRequest, saved: Path) -> None:
    request = EvaluateRequest((str(place / "shaken-1"),), str(place / "dense"), text=text, top_k=500)
    evaluate(replace(request, save_baseline=place / "kept-too"))
    assert tiny.contents(place / "kept-too") == tiny.contents(saved)


def test_with_the_whole_vocabulary_the_bound_is_exact(place: Path, text: TextRequest) -> None:
    evaluate(EvaluateRequest((str(place / "dense"),), text=text, save_baseline=place / "all", top_k=tiny.VOCABULARY))
    found = evaluate(EvaluateRequest((str(place / "shaken-0"),), str(place / "all"), text=text))
    exact = float(textbook(place, "shaken-0")["kl"].mean())
    assert found["candidates"][0]["fidelity"]["kl"]["mean"] == pytest.approx(exact, rel=1e-3)


def test_scores_are_not_compared_with_a_saved_baseline(place: Path, text: TextRequest, saved: Path) -> None:
    limits = Gates(min_recovery=0.99)
    request = EvaluateRequest(
        (str(place / "dense"),), str(saved), text=text, tasks=TasksRequest(("any",)), gates=limits
    )
    with pytest.raises(UsageError, match="--min-recovery compares scores, and '.*kept' keeps predictions only"):
        evaluate(request)


def test_a_saved_baseline_of_another_text_is_refused(place: Path, text: TextRequest, saved: Path) -> None:
    ids = evaluate(EvaluateRequest((str(place / "dense"),), text=replace(text, nsamples=4)))["evaluation"]["ids_sha256"]
    with pytest.raises(InputError, match="another text") as error:
        evaluate(EvaluateRequest((str(place / "shaken-0"),), str(saved), text=replace(text, nsamples=4)))
    index = json.loads((saved / "baseline.json").read_bytes())
    assert ids in error.value.message
    assert index["ids_sha256"] in error.value.message


def test_a_saved_baseline_of_a_model_that_has_changed_is_refused(
    place: Path, text: TextRequest, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(place / "dense", tmp_path / "model"))
    evaluate(EvaluateRequest((str(model),), text=text, save_baseline=tmp_path / "kept"))
    shutil.copyfile(place / "shaken-1" / "model.safetensors", model / "model.safetensors")
    with pytest.raises(InputError, match="other weights: sha256 [0-9a-f]{64}.* now have [0-9a-f]{64}"):
        evaluate(EvaluateRequest((str(place / "shaken-0"),), str(tmp_path / "kept"), text=text))
    shutil.rmtree(model)  # a model that is gone cannot be asked
    assert evaluate(EvaluateRequest((str(place / "shaken-0"),), str(tmp_path / "kept"), text=text))["passed"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["logits-00001", "baseline.json"])
def test_a_damaged_baseline_is_refused(place: Path, text: TextRequest, saved: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "kept"))
    if name == "baseline.json":
        index = json.loads((copy / name).read_bytes())
        del index["files"]
        (copy / name).write_text(json.dumps(index))
    else:
        flip(next(copy.glob(f"{name}-*")))
    with pytest.raises(InputError, match=name):
        evaluate(EvaluateRequest((str(place / "shaken-0"),), str(copy), text=text))


def test_a_baseline_is_not_saved_over_something_else(place: Path, text: TextRequest) -> None:
    with pytest.raises(OutputError, match="is no saved baseline"):
        evaluate(EvaluateRequest((str(place / "dense"),), text=text, save_baseline=place / "shaken-0"))
    assert (place / "shaken-0" / "model.safetensors").exists()


def test_a_run_that_fails_leaves_the_kept_baseline_as_it_was(
    place: Path, text: TextRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = EvaluateRequest((str(place / "dense"),), text=text, save_baseline=tmp_path / "kept")
    evaluate(request)
    before = tiny.contents(tmp_path / "kept")

    def fail(saver: Saver, identity: object) -> None:
        raise InputError("the disk the model is on went away")

    other = replace(request, models=(str(place / "shaken-0"),))
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "finish", fail)
        with pytest.raises(InputError, match="went away"):
            evaluate(other)
        with pytest.raises(InputError, match="went away"):
            evaluate(replace(other, save_baseline=tmp_path / "new"))
    assert tiny.contents(tmp_path / "kept") == before
    assert tiny.names(tmp_path) == ["kept"]
    evaluate(other)
    assert tiny.contents(tmp_path / "kept").keys().isdisjoint(before.keys() - {"baseline.json"})


def test_what_a_kill_left_of_a_baseline_is_replaced(place: Path, text: TextRequest, tmp_path: Path) -> None:
    for name in ("logits-00001-0.safetensors", ".logits-00002-0.safetensors.tmp"):
        (tmp_path / name).touch()
    evaluate(EvaluateRequest((str(place / "dense"),), text=text, save_baseline=tmp_path))
    index = json.loads((tmp_path / "baseline.json").read_bytes())
    assert tiny.names(tmp_path) == ["baseline.json", *(entry["name"] for entry in index["files"])]


# --- models that differ


def test_padded_vocabularies_are_compared_on_what_they_share(place: Path, text: TextRequest, tmp_path: Path) -> None:
    padded = tmp_path / "padded"
    changes = {name: lambda w: torch.cat([w, torch.zeros(128, tiny.HIDDEN)]) for name in ("model.embed_tokens.weight",)}
    changes["lm_head.weight"] = lambda w: torch.cat([w, 5 * torch.ones(128, tiny.HIDDEN)])
    tiny.llama(padded, changes=changes)
    tiny_config = tiny.config() | {"vocab_size": tiny.VOCABULARY + 128}
    (padded / "config.json").write_text(json.dumps(tiny_config))
    report = evaluate(EvaluateRequest((str(padded),), str(place / "dense"), text=text))
    assert report["candidates"][0]["fidelity"]["kl"]["max"] == pytest.approx(0, abs=1e-5)
    assert any("4,224 and 4,096" in warning for warning in report["warnings"])


def recurrent(folder: Path, place: Path) -> Path:
    """A model whose blocks hold matrices that belong to no linear: it does not run block by block."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        lru_width=32, attention_window_size=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    RecurrentGemmaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / "dense" / name, folder / name)
    return folder


def test_what_cannot_be_streamed_is_loaded_whole_and_reported(place: Path, text: TextRequest, tmp_path: Path) -> None:
    model = recurrent(tmp_path / "recurrent", place)
    report = evaluate(EvaluateRequest((str(model),), text=text))
    ids = windows_of(place)
    expected = -torch.log_softmax(logits(model, ids), -1).gather(-1, ids[:, 1:, None])
    found = report["candidates"][0]["fidelity"]["perplexity"]["compressed"]
    assert found == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    assert [fallback["action"] for fallback in report["fallbacks"]] == ["loaded whole into memory"]
    assert report["passed"] is True
    assert evaluate(EvaluateRequest((str(model),), text=text, strict=True))["passed"] is False


def test_too_little_memory_says_what_fits(place: Path, text: TextRequest) -> None:
    request = EvaluateRequest((str(place / "dense"),), str(place / "shaken-0"), text=text)
    with pytest.raises(MemoryLimitError, match=r"needs about .*, there is --max-memory 1 MiB"):
        evaluate(replace(request, max_memory=2**20))
    needs = Needs(fixed=1000, per_token=10)
    needs.check(tokens=100, seqlen=20, room=2000, limit=None)
    with pytest.raises(MemoryLimitError) as error:
        needs.check(tokens=120, seqlen=20, room=2000, limit=None)
    assert error.value.hint == "--nsamples 5 fits"


def test_a_part_that_fails_loses_nothing_that_was_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that are longer than the model allows: no case can be timed, of the baseline or of the candidate."""
    out = tmp_path / "report"
    command = ["evaluate", str(place / "shaken-0"), "--baseline", str(place / "dense"), "--seqlen", "32",
               "--text", str(place / "evaluation.txt"), "--nsamples", "3", "--device", "cpu", "-o", str(out), "--speed",
               "--prompt-lengths", "4000", "--junit", str(out / "junit.xml")]  # fmt: skip
    assert main(command) == 4
    report = json.loads((out / "report.json").read_bytes())
    assert schema.validate(report) == []
    assert report["passed"] is report["candidates"][0]["passed"] is False
    assert report["candidates"][0]["fidelity"]["kl"]["mean"] > 0
    assert [(each["model"], each["part"]) for each in report["failures"]] == [
        (str(place / "dense"), "speed"),
        (str(place / "shaken-0"), "speed"),
    ]
    said = "4000 + 32 tokens are more than the 128 the model allows"
    assert all(each["why"].count(said) == 1 for each in report["failures"])
    assert said in capsys.readouterr().err.splitlines()[-2]
    assert all(said in (out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    assert (out / "junit.xml").read_text(encoding="utf-8").count("<failure") == 2


def test_a_model_that_tasks_need_whole_has_to_fit(
    place: Path, text: TextRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block the model below fits; as a whole it does not, and that is said before it is run."""
    monkeypatch.setattr(estimate, "process", lambda: 2**30)
    monkeypatch.setattr(estimate, "_one", lambda *arguments: (0, 0, 64))
    request = EvaluateRequest((str(place / "dense"),), text=text, max_memory=2**30 + 2**20, dtype="float32")
    monkeypatch.setattr(estimate, "logit_tokens", lambda device: 1)
    assert evaluate(request)["passed"]
    with pytest.raises(MemoryLimitError, match=r"dense as a whole, for --tasks, needs about .* --max-memory") as caught:
        evaluate(replace(request, tasks=TasksRequest(("any",))))
    assert caught.value.hint == "leave out --tasks"


def test_through_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The request, the report and the exit code, once without a stand-in anywhere."""
    command = ["evaluate", str(place / "shaken-0"), "--baseline", str(place / "dense"), "--seqlen", "32",
               "--text", str(place / "evaluation.txt"), "--nsamples", "3", "--quiet", "--device", "cpu"]  # fmt: skip
    assert main([*command, "--json", "--max-kl", "10"]) == 0
    assert schema.validate(json.loads(capsys.readouterr().out)) == []
    assert main([*command, "--max-kl", "1e-9"]) == 4
    assert "max-kl: 0." in capsys.readouterr().err
