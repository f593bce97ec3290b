"""`llmpare prune`: flags and config file → the request, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import samples

from llmpare.cli.exits import main
from llmpare.compress import prune
from llmpare.compress.prune.cut import Cut, ShrinkRequest
from llmpare.compress.prune.request import MEASURED, MaskRequest, Pattern, PruneRequest
from llmpare.compress.request import Gates, Scheme, TextSpec

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
Asked = Callable[..., PruneRequest]
Refused = Callable[..., str]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """The request that `llmpare prune ARGUMENTS` makes."""
    made: list[PruneRequest] = []

    def run(request: PruneRequest, progress: Any) -> dict[str, Any]:
        made.append(request)
        return samples.report()

    engine = ModuleType("llmpare.compress.run")
    vars(engine)["run_prune"] = run
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.chdir(tmp_path)

    def asked(*arguments: str) -> PruneRequest:
        assert main(["prune", "model", "-o", "out", *arguments]) == 0
        return made.pop()

    return asked


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """What stderr says when `llmpare prune ARGUMENTS` is refused, with exit code 2."""

    def refused(*arguments: str) -> str:
        assert main(["prune", "model", "-o", "out", *arguments]) == 2
        return capsys.readouterr().err

    return refused


def mask(**changes: Any) -> MaskRequest:
    return MaskRequest("model", Path("out"), **{"options": prune.resolve(prune.DEFAULT, {}), **changes})


def test_masks(asked: Asked) -> None:
    assert asked("--sparsity", "0.5") == mask(sparsity=0.5)
    assert asked("--sparsity", "60%") == mask(sparsity=0.6)
    assert asked("--sparsity", "100%") == mask(sparsity=1.0)
    assert asked("--pattern", "2:4") == mask(pattern=Pattern(2, 4))
    assert asked("--sparsity", "0.5", "--allocation", "measured") == mask(allocation=MEASURED)
    assert asked("--sparsity", "0.5", "--ignore", "down", "--ignore", "o_proj") == mask(ignore=("down", "o_proj"))


def test_methods_and_their_options(asked: Asked, refused: Refused) -> None:
    options = prune.resolve("wanda", {"refit": 1.0})
    assert asked("--sparsity", "0.5", "--method", "wanda", "--refit") == mask(method="wanda", options=options)
    options = prune.resolve("sparsegpt", {"refit": 0.0, "damping": 0.1})
    assert asked("--sparsity", "0.5", "--method", "sparsegpt", "--no-refit", "--percdamp", "0.1") == mask(
        method="sparsegpt", options=options
    )
    assert asked("--sparsity", "0.5", "--iterations", "40") == mask(options=prune.resolve("alps", {"iterations": 40.0}))
    assert "method wanda has no option --iterations" in refused(
        "--sparsity", "0.5", "--method", "wanda", "--iterations", "9"
    )
    assert "did you mean wanda?" in refused("--sparsity", "0.5", "--method", "wanda2")


def test_then(asked: Asked, refused: Refused) -> None:
    assert asked("--pattern", "2:4", "--then", "W4A16") == mask(pattern=Pattern(2, 4), then=Scheme())
    assert asked("--sparsity", "0.5", "--then", "w3a16_asym", "--group-size", "64", "--format", "gptq") == mask(
        then=Scheme(3, 64, False), format="gptq"
    )
    assert "--group-size belongs to --then" in refused("--sparsity", "0.5", "--group-size", "64")
    assert "--format belongs to --then" in refused("--sparsity", "0.5", "--format", "gptq")


def test_what_every_run_takes(asked: Asked) -> None:
    flags = (
        "--dataset d --nsamples 3 --seqlen 9 --chat-template --eval-dataset e --eval-nsamples 2 --device cpu "
        "--dtype float32 --seed 4 --max-memory 1GB --revision main --trust-remote-code --allow-nonfinite "
        "--max-kl 0.1 --max-size 1GB --strict --force --restart"
    )
    assert asked("--sparsity", "0.5", *flags.split()) == mask(
        calibration=TextSpec("d", 3, 9, True),
        evaluation=TextSpec("e", 2, 9),
        device="cpu",
        dtype="float32",
        seed=4,
        max_memory=10**9,
        revision="main",
        trust_remote_code=True,
        allow_nonfinite=True,
        gates=Gates(max_kl=0.1, max_size=10**9),
        strict=True,
        force=True,
        restart=True,
    )


@pytest.mark.parametrize(
    ("flags", "cut"),
    [
        (("--ffn", "0.75"), Cut(ffn=0.75)),
        (("--heads", "50%", "--hidden", "0.875", "--round-to", "64"), Cut(heads=0.5, hidden=0.875, round_to=64)),
        (("--layers", "24"), Cut(layers=24)),
        (("--drop-layers", "20-22,5"), Cut(drop_layers=(5, 20, 21, 22))),
        (("--experts", "48"), Cut(experts=48)),
        (("--target-params", "6B"), Cut(target_params=6 * 10**9)),
        (("--target-params", "1.5M"), Cut(target_params=1_500_000)),
        (("--target-size", "4GB"), Cut(target_size=4 * 10**9)),
    ],
)
def test_shapes(flags: tuple[str, ...], cut: Cut, asked: Asked) -> None:
    assert asked(*flags) == ShrinkRequest("model", Path("out"), cut=cut)


def test_max_kl_is_the_target_where_nothing_else_says_how_much(asked: Asked) -> None:
    gates = Gates(max_kl=0.02)
    assert asked("--max-kl", "0.02") == ShrinkRequest("model", Path("out"), cut=Cut(max_kl=0.02), gates=gates)
    assert asked("--ffn", "0.5", "--max-kl", "0.02") == ShrinkRequest(
        "model", Path("out"), cut=Cut(ffn=0.5), gates=gates
    )


def test_the_config_file_holds_the_same_names(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sparsity: 0.5\nrefit: false\nignore: [down]\nnsamples: 7\n")
    options = prune.resolve("alps", {"refit": 0.0})
    expected = mask(options=options, ignore=("down",), calibration=TextSpec(nsamples=7))
    assert asked("--config", "run.yaml") == expected
    (tmp_path / "pattern.yaml").write_text("pattern: 2:4\n")
    assert asked("--config", "pattern.yaml") == asked("--pattern", "2:4")
    (tmp_path / "shape.yaml").write_text("drop_layers: [3, 5-6]\n")
    assert asked("--config", "shape.yaml") == ShrinkRequest("model", Path("out"), cut=Cut(drop_layers=(3, 5, 6)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), ("nothing says what to prune", "--ffn 0.75")),
        (("--method", "wanda"), ("--method says nothing of how much to prune", "--sparsity 0.5")),
        (("--sparsity", "0.5", "--pattern", "2:4"), ("both say how much to prune",)),
        (("--sparsity", "0.5", "--ffn", "0.5"), ("do one after the other",)),
        (("--sparsity", "1"), ("--sparsity: expected a percentage",)),
        (("--pattern", "two"), ("is not N:M",)),
        (("--drop-layers", "5-3"), ("--drop-layers: expected numbers and ranges",)),
        (("--target-params", "many"), ("--target-params: expected a count",)),
        (("--sparsity", "0.5", "--ignore", "["), ("is not a regular expression",)),
        (("--sparsity", "0.5", "--then", "W5A16"), ("unknown scheme",)),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], says: tuple[str, ...], refused: Refused) -> None:
    message = refused(*flags)
    for part in says:
        assert part in message


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["prune", str(TINY_LLAMA), "-o", str(tmp_path / "out"), "--pattern", "2:4", "--dry-run"]
    assert main(command) == 0
    assert "2:4 sparse" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["command"], told["method"], told["format"]) == ("plan", "alps", "dense")
    assert not (tmp_path / "out").exists()
