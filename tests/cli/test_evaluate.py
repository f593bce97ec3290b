"""From a command line to an EvaluateRequest, and from its report to what a shell sees."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import evaluations
import pytest

from llmpare.cli.exits import main
from llmpare.compress.evaluate.request import EvaluateRequest, SpeedRequest, TasksRequest, TextRequest
from llmpare.compress.request import Gates

Asked = Callable[..., EvaluateRequest]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[EvaluateRequest]:
    """Requests that reached the evaluation, which is replaced and finds what evaluations.py says."""
    found: list[EvaluateRequest] = []

    def evaluate(request: EvaluateRequest, progress: Any) -> dict[str, Any]:
        found.append(request)
        return evaluations.evaluation(request.models) | {"passed": "bad" not in request.models}

    engine = ModuleType("llmpare.compress.evaluate.run")
    vars(engine)["run_evaluate"] = evaluate
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def asked(made: list[EvaluateRequest], capsys: pytest.CaptureFixture[str]) -> Asked:
    """The request that `llmpare evaluate ARGUMENTS` makes."""

    def asked(*arguments: str) -> EvaluateRequest:
        assert main(["evaluate", *arguments]) == 0, capsys.readouterr().err
        return made.pop()

    return asked


DEFAULT = EvaluateRequest(("model",))
DENSE = replace(DEFAULT, baseline="dense")


def test_nothing_but_a_model(asked: Asked) -> None:
    assert asked("model") == DEFAULT


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("one two three", EvaluateRequest(("one", "two", "three"))),
        ("model --baseline dense", DENSE),
        ("model -o report", replace(DEFAULT, out=Path("report"))),
        ("model --text a.txt --text b.jsonl", replace(DEFAULT, text=TextRequest(("a.txt", "b.jsonl")))),
        ("model --eval-dataset wikitext2", replace(DEFAULT, text=TextRequest(("wikitext2",)))),
        ("model --nsamples 9 --seqlen 512", replace(DEFAULT, text=TextRequest(nsamples=9, seqlen=512))),
        ("model --save-baseline kept --top-k 9", replace(DEFAULT, save_baseline=Path("kept"), top_k=9)),
        ("model --tasks arc_easy,hellaswag", replace(DEFAULT, tasks=TasksRequest(("arc_easy", "hellaswag")))),
        (
            "model --tasks a --tasks b --limit 5 --num-fewshot 0 --include tasks --task-batch-size 2",
            replace(DEFAULT, tasks=TasksRequest(("a", "b"), 5, 0, Path("tasks"), 2)),
        ),
        ("model --speed", replace(DEFAULT, speed=SpeedRequest())),
        (
            "x --speed --engines transformers,vllm --batch-sizes 1,2 --prompt_lengths 64 --new-tokens 9 --repeats 2"
            " --variations static,off",
            EvaluateRequest(
                ("x",), speed=SpeedRequest(("transformers", "vllm"), (1, 2), (64,), ("static", "off"), 9, 2)
            ),
        ),
        (
            "model --baseline dense --max-kl 0.05 --max-perplexity-increase 2% --min-agreement 97%",
            replace(DENSE, gates=Gates(max_kl=0.05, max_perplexity_increase=0.02, min_agreement=0.97)),
        ),
        (
            "model --baseline dense --tasks a --min-recovery 99%",
            replace(DENSE, tasks=TasksRequest(("a",)), gates=Gates(min_recovery=0.99)),
        ),
        (
            "model --speed --max-size 4GB --min-tokens-per-second 50",
            replace(DEFAULT, speed=SpeedRequest(), gates=Gates(max_size=4 * 10**9, min_tokens_per_second=50.0)),
        ),
        (
            "model --junit gates.xml --against old/report.json",
            replace(DEFAULT, junit=Path("gates.xml"), against=Path("old/report.json")),
        ),
        (
            "model --device cuda:1 --dtype float32 --max-memory 8GiB",
            replace(DEFAULT, device="cuda:1", dtype="float32", max_memory=2**33),
        ),
        (
            "model --revision main --trust-remote-code --strict --quiet --no-color",
            replace(DEFAULT, revision="main", trust_remote_code=True, strict=True),
        ),
    ],
)
def test_flags(asked: Asked, arguments: str, expected: EvaluateRequest) -> None:
    assert asked(*arguments.split()) == expected


def test_every_field_of_a_request_can_be_set() -> None:
    """A field that no flag reaches is a promise that cannot be kept."""
    cases = [case[1] for case in test_flags.pytestmark[0].args[1]]

    def reached(default: Any, several: list[Any]) -> set[str]:
        return {f.name for each in several for f in fields(each) if vars(each)[f.name] != vars(default)[f.name]}

    assert reached(DEFAULT, cases) == {field.name for field in fields(EvaluateRequest)}
    assert reached(TextRequest(), [case.text for case in cases]) == {f.name for f in fields(TextRequest)}
    tasks = [case.tasks for case in cases if case.tasks]
    assert reached(TasksRequest(("x",)), tasks) == {f.name for f in fields(TasksRequest)}
    speed = [case.speed for case in cases if case.speed]
    assert reached(SpeedRequest(), speed) == {f.name for f in fields(SpeedRequest)}
    assert reached(Gates(), [case.gates for case in cases]) == {f.name for f in fields(Gates)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "missing MODEL"),
        ("model --text a.txt --eval-dataset c4", "both the text"),
        ("model --max-kl 0.05", "--max-kl compares with a baseline"),
        ("model --min-agreement 97%", "--min-agreement compares with a baseline"),
        ("model --baseline dense --min-recovery 99%", "--min-recovery needs scores of tasks"),
        ("model --min-tokens-per-second 9", "add --speed"),
        ("model --engines vllm", "--engines belongs to --speed"),
        ("model --batch-sizes 1,x --speed", "--batch-sizes: expected whole numbers"),
        ("model --limit 5", "belong to --tasks"),
        ("model --tasks a,,b", "--tasks: expected names"),
        ("model --top-k 9", "belongs to --save-baseline"),
        ("model --save-baseline kept --top-k 4", "--top-k 4"),
        ("one two --save-baseline kept", "which of the models is the baseline?"),
        ("model --bits 4", "No such option"),
        ("model --config run.yaml", "there is no 'bits'"),
    ],
)
def test_what_is_refused(
    made: list[EvaluateRequest], capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    Path("run.yaml").write_text("bits: 4\n")
    assert main(["evaluate", *arguments.split()]) == 2
    assert made == []
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_a_config_file_holds_the_names_of_the_flags(asked: Asked) -> None:
    Path("run.yaml").write_text(
        "models: [one, two]\nbaseline: dense\ntext: notes.txt\nspeed: true\nbatch_sizes: [1, 8]\nmax-kl: 0.1\n"
    )
    expected = EvaluateRequest(
        ("one", "two"),
        "dense",
        text=TextRequest(("notes.txt",)),
        speed=SpeedRequest(batch_sizes=(1, 8)),
        gates=Gates(max_kl=0.1),
    )
    assert asked("--config", "run.yaml") == expected
    assert asked("three", "--config", "run.yaml") == replace(expected, models=("three",))


@pytest.mark.usefixtures("made")
def test_what_a_shell_gets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures for people on stderr; on stdout the folder, or the report with --json, or nothing."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert main(["evaluate", "one", "two", "--baseline", "dense", "-o", "report"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "report\n"
    for fact in ("model       one", "model       two", "KL          0.006000", "written     report"):
        assert fact in shown.err, fact
    assert "`two`" in Path("summary.md").read_text(encoding="utf-8")
    assert main(["evaluate", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"][0]["name"] == "one"
    assert main(["evaluate", "one"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("made")
def test_a_report_that_did_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "bad", "--json", "--strict"]) == 4
    shown = capsys.readouterr()
    assert json.loads(shown.out)["passed"] is False
    assert "the report is complete" in shown.err
