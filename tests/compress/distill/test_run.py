"""Distillation through the command line: files in, files out, whatever happens on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmpare.cli.exits import main
from llmpare.cli.progress import Watcher
from llmpare.compress.checkpoint import publish
from llmpare.compress.report import schema


class Place:
    """A teacher, a student that was pruned to nothing in particular, and text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = tiny.llama(folder / "teacher", tied=True)
        self.student = tiny.llama(folder / "student", tied=True, inner=64)
        self.text = tiny.texts(folder)

    def command(self, out: Path, *more: str) -> list[str]:
        """Six steps of four windows; what is in `more` wins."""
        own = ("--student", "--student-ffn", "--student-config")
        student = [] if any(word in own for word in more) else ["--student", str(self.student)]
        return [
            "distill", "--teacher", str(self.teacher), *student, "-o", str(out), "--dataset", str(self.text[0]),
            "--eval-dataset", str(self.text[1]), "--eval-nsamples", "2", "--seqlen", "32", "--tokens", "768",
            "--batch-tokens", "128", "--lr", "1e-3", "--device", "cpu", "--quiet", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """A run that nothing happened to."""
    out = place.folder / "whole"
    assert main(place.command(out)) == 0
    return out


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    assert schema.validate(found) == []
    return found


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_the_output_is_an_ordinary_checkpoint_nearer_to_the_teacher(place: Place, whole: Path) -> None:
    report = report_of(whole)
    found = report["distillation"]
    assert report["fidelity"]["kl"]["mean"] < found["before"]["kl"]["mean"]
    assert found["training"]["tokens"] == 768
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4, 5, 6]
    assert found["curve"][-1]["loss"] < found["curve"][0]["loss"]
    assert "Training" in (whole / "report.md").read_text(encoding="utf-8")
    assert "Loss while training" in (whole / "report.html").read_text(encoding="utf-8")
    before, after = load_file(place.student / "model.safetensors"), load_file(whole / "model.safetensors")
    assert [(n, t.shape, t.dtype) for n, t in before.items()] == [(n, t.shape, t.dtype) for n, t in after.items()]
    assert all(not torch.equal(before[name], after[name]) for name in before)
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    assert not list(whole.glob("**/checkpoint-*"))
    assert main(["verify", str(whole), "--quiet"]) == 0


def test_the_same_command_again_verifies(place: Place, whole: Path) -> None:
    before = tiny.contents(whole)
    assert main([*place.command(whole), "--max-kl", "0"]) == 4
    assert main(place.command(whole)) == 0
    assert tiny.contents(whole) == before


def test_another_student_of_the_same_shape_makes_another_output(
    place: Place, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(place.student, tmp_path / "student")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1  # of the last weight, a bit that does not say how large it is
    (other / "model.safetensors").write_bytes(data)
    assert main(place.command(whole, "--student", str(other))) == 5
    assert "was made with other settings: student.weights_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(
    place: Place, whole: Path, signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, 3, lambda: signal.raise_signal(signum))
        assert main(place.command(out)) == 128 + signum
    assert "run the same command to resume" in capsys.readouterr().err
    assert not out.exists()
    assert os.listdir(tmp_path / "out.partial" / "training") == ["checkpoint-4"]  # the step that was going on
    if signum == signal.SIGINT:  # what was saved is the same for both
        assert main(place.command(out)) == 0
        assert weights(out) == weights(whole)


def stop_at(patched: pytest.MonkeyPatch, step: int, how: Any) -> None:
    """Within the context, how() is called when that step is shown."""

    def watched(self: Watcher, done: int, total: int, left: float, facts: Mapping[str, float]) -> None:
        if done == step:
            how()

    patched.setattr(Watcher, "step", watched)


KILLED = """
import os, signal, sys
from llmpare.cli.exits import main
from llmpare.cli.progress import Watcher
Watcher.step = lambda self, done, *rest: os.kill(os.getpid(), signal.SIGKILL) if done == 4 else None
sys.exit(main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}


def test_a_killed_run_resumes_to_the_same_weights(place: Place, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = place.command(out, "--save-steps", "2")
    done = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    training = tmp_path / "out.partial" / "training"
    (training / "checkpoint-3").mkdir()  # as if it had been killed while it wrote one
    assert "checkpoint-2" in os.listdir(training)
    assert main(command) == 0
    assert weights(out) == weights(whole)


@pytest.mark.slow
def test_two_processes_do_what_one_does(place: Place, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmpare.cli"]
    done = subprocess.run(
        [sys.executable, *launch, *place.command(out)],
        env={**environment(), "OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]
    alone, together = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    start = load_file(place.student / "model.safetensors")
    for name, tensor in alone.items():
        moved = (tensor - start[name]).norm()
        assert (tensor - together[name]).norm() < 1e-3 * moved, name
    assert report_of(out)["distillation"]["training"]["processes"] == 2


def test_a_student_is_carved_or_made_anew(place: Place, tmp_path: Path, capsys: Any) -> None:
    carved = tmp_path / "carved"
    assert main(place.command(carved, "--student-ffn", "0.5")) == 0
    assert load_file(carved / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
    assert report_of(carved)["distillation"]["student"]["made"] == "carved from the teacher"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny.config(blocks=1, hidden=32, inner=48, tied=True)))
    new = tmp_path / "new"
    assert main(place.command(new, "--student-config", str(config), "--hidden-loss", "mse")) == 0
    assert report_of(new)["distillation"]["student"]["made"] == "new"
    assert set(load_file(new / "model.safetensors")) == set(AutoModelForCausalLM.from_pretrained(new).state_dict()) - {
        "lm_head.weight"
    }
    assert tiny.names(new) == sorted([*tiny.names(carved)])


def test_a_run_that_ends_after_its_report_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student that was carved for it is gone by then."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(place.command(whole, "--student-ffn", "0.5")) == 0
    command, build = place.command(out, "--student-ffn", "0.5"), publish.build_manifest

    def stopped(folder: Path, **rest: Any) -> dict[str, Any]:
        if folder.name == "out.partial":  # not that of the carving
            signal.raise_signal(signal.SIGINT)
        return build(folder, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(publish, "build_manifest", stopped)
        assert main(command) == 130
    assert not (tmp_path / "out.partial" / "student").exists()
    assert main(command) == 0
    assert weights(out) == weights(whole)
    assert tiny.names(out) == tiny.names(whole)


def test_adapters_alone_are_trained_and_merged(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out"
    assert main(place.command(out, "--lora-rank", "4", "--loss", "jsd", "--gradient-checkpointing")) == 0
    before, after = load_file(place.student / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    rank = torch.linalg.matrix_rank(
        after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    )
    assert int(rank) <= 4


def test_numbers_that_break_stop_the_run_and_leave_what_was_good(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from llmpare.compress.distill import losses

    calls: Iterator[int] = iter(range(10**6))
    real = losses.forward_kl

    def breaks(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return real(student, teacher, temperature) * (float("nan") if next(calls) >= 4 else 1.0)

    monkeypatch.setattr(losses, "forward_kl", breaks)
    out = tmp_path / "out"
    assert main(place.command(out, "--save-steps", "2")) == 3
    said = capsys.readouterr().err
    assert "the loss is nan at step 5 of 6" in said
    assert "checkpoint-4' is the last good one" in said
    assert os.listdir(tmp_path / "out.partial" / "training") == ["checkpoint-4"]
    assert all(
        t.isfinite().all() for t in load_file(tmp_path / "out.partial/training/checkpoint-4/model.safetensors").values()
    )


def test_a_padded_vocabulary_is_compared_where_both_have_it(place: Place, tmp_path: Path, capsys: Any) -> None:
    student = tmp_path / "padded"
    shutil.copytree(place.student, student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "vocab_size": tiny.VOCABULARY + 64}))
    tensors = load_file(student / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(64, tiny.HIDDEN)])
    from safetensors.torch import save_file

    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    assert main(place.command(tmp_path / "out", "--student", str(student))) == 0
    assert "compared on those that both have" in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors")[name].shape == (tiny.VOCABULARY + 64, tiny.HIDDEN)


REFUSED = {
    "no such student": (["--student", "nowhere"], 2, "does not exist"),
    "two students": (["--student", "x", "--student-ffn", "0.5"], 2, "several say what the student is"),
    "unknown loss": (["--loss", "l2"], 2, "unknown loss 'l2'"),
    "beta without jsd": (["--beta", "0.3"], 2, "--beta belongs to --loss jsd"),
    "states without a teacher": (["--loss", "cross-entropy", "--hidden-loss", "mse"], 2, "does without"),
    "no share": (["--student-ffn", "0"], 2, "--student-ffn 0 is no share"),
    "layers that are not there": (
        ["--student-ffn", "0.5", "--student-layers", "9"],
        2,
        "--student-layers 9: the model has 2",
    ),
    "too short": (["--seqlen", "128", "--eval-nsamples", "1000"], 3, "1000 windows of 128 need"),
    "no room": (["--max-memory", "100MiB"], 6, "the training needs about"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(name: str, place: Place, tmp_path: Path, capsys: Any) -> None:
    more, code, said = REFUSED[name]
    assert main(place.command(tmp_path / "out", *more)) == code
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_another_tokenizer_is_refused_with_the_reason(place: Place, tmp_path: Path, capsys: Any) -> None:
    student = tmp_path / "other"
    shutil.copytree(place.student, student)
    tokenizer = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert main(place.command(tmp_path / "out", "--student", str(student))) == 3
    said = capsys.readouterr().err
    assert "different vocabularies" in said
    assert "carve it from the teacher" in said


def test_a_dry_run_says_what_it_would_take(place: Place, tmp_path: Path, capsys: Any) -> None:
    assert main([*place.command(tmp_path / "out"), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps"] == 6
    assert planned["tokens"] == 768
    assert planned["memory_bytes"] > planned["output_bytes"]
    assert main([*place.command(tmp_path / "out"), "--dry-run", "--json", "--device", "cuda"]) == 0
    on_gpu = json.loads(capsys.readouterr().out)
    assert on_gpu["memory_bytes"] < planned["memory_bytes"], "the teacher and activations take two bytes a number there"
    assert os.listdir(tmp_path) == []


def test_a_cached_teacher_teaches_the_same(place: Place, whole: Path, tmp_path: Path) -> None:
    """All of 4096 tokens but a tail of no weight would be the same; 64 of them are nearly so."""
    out = tmp_path / "out"
    assert main(place.command(out, "--cache-teacher", str(tmp_path / "cache"))) == 0
    assert (tmp_path / "cache" / "manifest.json").exists()
    start, live, cached = (load_file(f / "model.safetensors") for f in (place.student, whole, out))
    name = "model.layers.1.mlp.down_proj.weight"
    moved, other = live[name] - start[name], cached[name] - start[name]
    assert float(torch.cosine_similarity(moved.flatten(), other.flatten(), dim=0)) > 0.5
    assert report_of(out)["distillation"]["training"]["learned_from"] == "the teacher"


def test_a_cache_is_enough(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without the teacher learns the same to the last bit; one without its text, or a cache, is refused."""
    kept = ["--cache-teacher", str(tmp_path / "cache")]
    assert main(place.command(tmp_path / "with", *kept)) == 0

    def alone(out: Path, *more: str) -> list[str]:
        words = place.command(out, *more)
        at = words.index("--teacher")
        return words[:at] + words[at + 2 :]

    assert main(alone(tmp_path / "without", *kept)) == 0
    assert weights(tmp_path / "without") == weights(tmp_path / "with")
    report = report_of(tmp_path / "without")
    assert report["distillation"]["training"]["learned_from"] == "the cache of an absent teacher"
    assert any("teacher is not at hand" in warning for warning in report["warnings"])
    capsys.readouterr()
    for code, words, more in (
        (3, "another text", ["--dataset", str(place.text[1]), *kept]),
        (3, "no cache of a teacher", ["--cache-teacher", str(tmp_path / "nothing")]),
        (2, "--teacher", []),
    ):
        assert main(alone(tmp_path / "refused", *more)) == code
        assert words in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


def test_a_student_writes_for_itself_and_learns_to_stop_early(place: Place, tmp_path: Path) -> None:
    out, student = tmp_path / "out", tmp_path / "student"
    shutil.copytree(place.student, student)
    (student / "generation_config.json").write_text('{"do_sample": true, "num_assistant_tokens": 3}')
    assert main(place.command(out, "--student", str(student), "--on-policy", "0.5", "--early-exit", "1")) == 0
    report = report_of(out)
    drafting = report["distillation"]["early_exits"][0]["generation_config"]
    assert drafting["num_assistant_tokens"] == 20
    assert json.loads((out / "generation_config.json").read_bytes()) == {"do_sample": True, **drafting}
    assert "as `generation_config.json` now says" in (out / "report.md").read_text(encoding="utf-8")
    assert report["request"]["early_exit"] == [1]
    assert [each["exit"] for each in report["distillation"]["early_exits"]] == [1]
    assert "Early exits" in (out / "report.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.zeros(1, 4, dtype=torch.long)
    drafted = model.generate(ids, assistant_early_exit=1, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_text_alone_is_a_loss_too(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(place.command(out, "--loss", "cross-entropy")) == 0
    assert report_of(out)["distillation"]["training"]["learned_from"] == "the text alone"
    assert main(place.command(tmp_path / "more", "--loss", "cross-entropy", "--cache-teacher", "x")) == 2


@pytest.mark.parametrize("loss", ["forward-kl", "cross-entropy"])
def test_prompts_and_padding_teach_nothing(loss: str, place: Place, tmp_path: Path) -> None:
    """Rows that differ in what is padding only give the same weights; without labels, prompts teach as well."""
    rows = torch.randint(2, 200, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
    hidden, mask = [-100] * 8, [1] * 24 + [0] * 8
    texts = {
        "masked": [{"input_ids": row[:24] + [0] * 8, "labels": hidden + row[8:24] + hidden} for row in rows],
        "padded": [{"input_ids": row[:24] + [1] * 8, "labels": hidden + row[8:24] + [1] * 8} for row in rows],
        "prompted": [{"input_ids": row} for row in rows],
        "whole": [{"input_ids": row} for row in rows],
    }
    made = {}
    for name, lines in texts.items():
        more = {"attention_mask": mask} if name in ("padded", "prompted") else {}
        text = tmp_path / f"{name}.jsonl"
        text.write_text("\n".join(json.dumps({**line, **more}) for line in lines))
        assert main(place.command(tmp_path / name, "--dataset", str(text), "--loss", loss)) == 0
        made[name] = weights(tmp_path / name)
    assert made["masked"] == made["padded"]
    assert len(set(made.values())) == 3


def test_a_student_is_trained_for_its_codes(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--student-scheme", "W4A16", "--group-size", "32", "--lr", "3e-4"]
    assert main(place.command(out, *more)) == 0
    report = report_of(out)
    assert report["distillation"]["quantized_without_training"]["kl"]["mean"] > 0
    assert 4.5 < report["size"]["linear_bits_per_weight"] < 5.1  # a scale of 16 bits per 32 weights, and the shapes
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert main(["verify", str(out), "--quiet"]) == 0
