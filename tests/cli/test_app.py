"""From a command line to the request: every flag, the config file, and what is refused."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import samples

from llmpare.cli.exits import main
from llmpare.compress.quantize import resolve
from llmpare.compress.request import AUTO, Gates, LayerRule, QuantizeRequest, Scheme, TextSpec

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"

Asked = Callable[..., QuantizeRequest]
Refused = Callable[..., str]


@pytest.fixture
def requests_made(monkeypatch: pytest.MonkeyPatch) -> list[QuantizeRequest]:
    """Requests that reached the engine, which is replaced: what a run does with one is tested elsewhere."""
    made: list[QuantizeRequest] = []

    def quantize(request: QuantizeRequest, progress: Any) -> dict[str, Any]:
        made.append(request)
        return samples.report()

    engine = ModuleType("llmpare.compress.run")
    vars(engine)["run_quantize"] = quantize
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    return made


@pytest.fixture
def asked(
    requests_made: list[QuantizeRequest], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> Asked:
    """The request that `llmpare quantize ARGUMENTS` makes."""
    monkeypatch.chdir(tmp_path)

    def asked(*arguments: str) -> QuantizeRequest:
        assert main(["quantize", *arguments]) == 0, capsys.readouterr().err
        return requests_made.pop()

    return asked


@pytest.fixture
def refused(
    requests_made: list[QuantizeRequest], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> Refused:
    """What stderr says when `llmpare quantize ARGUMENTS` is refused, with exit code 2."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: str) -> str:
        assert main(["quantize", *arguments]) == 2
        assert requests_made == []
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return refused


DEFAULT = QuantizeRequest("model", Path("out"), options=resolve("gptq", {}))


def test_nothing_but_model_and_out(asked: Asked) -> None:
    assert asked("model", "-o", "out") == DEFAULT


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ("--scheme W3A16", {"scheme": Scheme(3)}),
        ("--scheme w8a16_asym --group-size 64", {"scheme": Scheme(8, 64, False)}),
        ("--bits 3 --group-size -1 --asym", {"scheme": Scheme(3, -1, False)}),
        ("--group-size auto", {"scheme": Scheme(4, AUTO)}),
        ("--asym --sym", {}),
        ("--method rtn", {"method": "rtn", "options": resolve("rtn", {})}),
        ("--best", {"method": "tuned", "options": resolve("tuned", {})}),
        ("--method tuned --best --steps 7", {"method": "tuned", "options": resolve("tuned", {"steps": 7.0})}),
        ("--step-size 1e-3 --best", {"method": "tuned", "options": resolve("tuned", {"step_size": 0.001})}),
        ("--damping 0.1 --sweeps 3", {"options": resolve("gptq", {"damping": 0.1, "sweeps": 3.0})}),
        ("--rounds 0 --correction 0.5", {"options": resolve("gptq", {"rounds": 0.0, "correction": 0.5})}),
        ("--format gptq", {"format": "gptq"}),
        ("--ignore lm_head --ignore down$", {"rules": (LayerRule("lm_head", None), LayerRule("down$", None))}),
        ("--dataset notes.jsonl --nsamples 64", {"calibration": TextSpec("notes.jsonl", 64)}),
        ("--seqlen 512", {"calibration": TextSpec(seqlen=512), "evaluation": TextSpec(seqlen=512)}),
        ("--chat-template", {"calibration": TextSpec(chat_template=True)}),
        ("--eval-dataset test.txt --eval-nsamples 9", {"evaluation": TextSpec("test.txt", 9)}),
        ("--max-kl 0.05", {"gates": Gates(max_kl=0.05)}),
        ("--max-perplexity-increase 2%", {"gates": Gates(max_perplexity_increase=0.02)}),
        ("--min-agreement 97% --max-size 4GB", {"gates": Gates(min_agreement=0.97, max_size=4 * 10**9)}),
        ("--device cuda:1 --dtype bfloat16", {"device": "cuda:1", "dtype": "bfloat16"}),
        ("--seed 7 --max-memory 16GiB", {"seed": 7, "max_memory": 2**34}),
        ("--revision main --trust-remote-code", {"revision": "main", "trust_remote_code": True}),
        ("--route-all", {"route_all": True}),
        ("--allow-nonfinite --strict", {"allow_nonfinite": True, "strict": True}),
        ("--force --restart", {"force": True, "restart": True}),
        ("--json --quiet --no-color", {}),
        # snake_case, and what other tools taught people to type
        ("--group_size 64 --max_kl 0.05", {"scheme": Scheme(group_size=64), "gates": Gates(max_kl=0.05)}),
        ("--wbits 8 --groupsize 32", {"scheme": Scheme(8, 32)}),
        ("--num-calibration-samples 5 --max-seq-length 99", {
            "calibration": TextSpec(nsamples=5, seqlen=99), "evaluation": TextSpec(seqlen=99)}),
        ("--num_calibration_samples 5", {"calibration": TextSpec(nsamples=5)}),
        ("--percdamp 0.05", {"options": resolve("gptq", {"damping": 0.05})}),
        ("--desc-act", {}),
        ("--desc_act", {}),
    ],
)  # fmt: skip
def test_flags(asked: Asked, arguments: str, changes: dict[str, Any]) -> None:
    assert asked("model", "-o", "out", *arguments.split()) == replace(DEFAULT, **changes)


@pytest.mark.parametrize("flag", ["--out", "-o", "--output", "--output_dir", "--output-dir"])
def test_every_way_to_say_out(asked: Asked, flag: str) -> None:
    assert asked("model", flag, "there").out == Path("there")


def test_every_field_of_a_request_can_be_set() -> None:
    """A field that no flag reaches is a promise that cannot be kept."""
    reached = {name for case in test_flags.pytestmark[0].args[1] for name in case[1]}
    assert {field.name for field in fields(QuantizeRequest)} == reached | {"model", "out"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("model", "missing -o OUT"),
        ("-o out", "missing MODEL"),
        ("model -o out --bits 5", "5 bits are not supported"),
        ("model -o out --bits four", "--bits: expected a whole number, got 'four'"),
        ("model -o out --group-size 100", "group size 100"),
        ("model -o out --group-size 0", "--group-size: expected 32, 64, 128, -1 or auto, got '0'"),
        ("model -o out --group-size big", "--group-size: expected a whole number or auto"),
        ("model -o out --scheme W4A4", "unknown scheme 'W4A4'"),
        ("model -o out --scheme W4A16 --bits 3", "--bits 3 contradicts --scheme W4A16"),
        ("model -o out --scheme W4A16_ASYM --sym", "contradicts"),
        # Row 15: an option of another method, an unknown method
        ("model -o out --method gtpq", "did you mean gptq?"),
        ("model -o out --steps 3", "--steps belongs to tuned"),
        ("model -o out --method rtn --damping 0.1", "rtn has no option --damping"),
        ("model -o out --best --method rtn", "--best contradicts --method rtn"),
        ("model -o out --dampin 0.1", "--damping"),
        ("model -o out --damping -1", "--damping: expected a number from 0"),
        ("model -o out --rounds 1.5", "--rounds: expected a whole number"),
        ("model -o out --sweeps -1", "--sweeps: expected a whole number from 0"),
        ("model -o out --correction 5", "--correction: expected a number from 0 to 1"),
        ("model -o out --best --steps -5", "--steps: expected a whole number from 0"),
        ("model -o out --best --step-size -1", "--step-size: expected a number from 0"),
        ("model -o out --ignore [", "not a regular expression"),
        ("model -o out --max-kl nan", "--max-kl: expected"),
        ("model -o out --min-agreement 97", "--min-agreement: expected a percentage"),
        ("model -o out --max-size big", "--max-size: expected a size"),
        ("model -o out --nsamples 0", "--nsamples: expected a whole number from 1"),
        ("model -o out --device gpu", "expected auto, cpu, cuda or cuda:N"),
        ("model -o out --dtype int8", "expected auto, float32"),
        ("model -o out --config none.yaml", "none.yaml: No such file"),
    ],
)
def test_what_is_refused(refused: Refused, arguments: str, said: str) -> None:
    assert said in refused(*arguments.split())


def write(text: str) -> str:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return "run.yaml"


def test_a_config_file_holds_the_names_of_the_flags(asked: Asked) -> None:
    config = write(
        """
        model: model
        out: out
        bits: 3
        group_size: 64
        sym: false
        percdamp: 0.05
        ignore: [lm_head, "down$"]
        max-kl: 5e-2
        max_perplexity_increase: 2%
        max-size: 4GB
        strict: true
        """
    )
    assert asked("--config", config) == replace(
        DEFAULT,
        scheme=Scheme(3, 64, False),
        options=resolve("gptq", {"damping": 0.05}),
        rules=(LayerRule("lm_head", None), LayerRule("down$", None)),
        gates=Gates(max_kl=0.05, max_perplexity_increase=0.02, max_size=4 * 10**9),
        strict=True,
    )


@pytest.mark.parametrize("revision", ["0100", "1_000", "1.10", "2024-01-01", "12:30", "123"])
def test_a_value_of_the_file_is_what_is_written_there(asked: Asked, revision: str) -> None:
    """YAML 1.1 has numbers in base 8 and 60, and dates."""
    request = asked("--config", write(f"model: model\nout: out\nrevision: {revision}\n"))
    assert request == replace(DEFAULT, revision=revision)


def test_a_flag_wins_over_the_file(asked: Asked) -> None:
    config = write("model: one\nout: two\nbits: 3\nasym: true\nignore: a")
    request = asked("model", "--config", config, "--bits", "8", "--sym", "--ignore", "b", "-o", "out")
    assert request == replace(DEFAULT, scheme=Scheme(8), rules=(LayerRule("b", None),))


def test_layers_of_a_config_file(asked: Asked) -> None:
    """What a layer's rule leaves open is as in the run's own scheme; ignored layers come first."""
    config = write(
        """
        layers:
          - {match: down_proj, bits: 8}
          - {match: o_proj, scheme: W8A16_ASYM, group-size: 32}
          - {match: "layers.0", group_size: -1, asym: false}
          - {match: lm_head, dense: true}
        """
    )
    request = asked("model", "-o", "out", "--config", config, "--bits", "3", "--asym", "--ignore", "gate")
    assert request.rules == (
        LayerRule("gate", None),
        LayerRule("down_proj", Scheme(8, 128, False)),
        LayerRule("o_proj", Scheme(8, 32, False)),
        LayerRule("layers.0", Scheme(3, -1, True)),
        LayerRule("lm_head", None),
    )


def test_a_pattern_may_be_marked_as_one(asked: Asked) -> None:
    """As llm-compressor and compressed-tensors have it."""
    config = write("layers: [{match: 're:.*o_proj$', bits: 8}]")
    request = asked("model", "-o", "out", "--config", config, "--ignore", "re:.*down_proj$")
    assert request.rules == (LayerRule(".*down_proj$", None), LayerRule(".*o_proj$", Scheme(8)))


def test_a_marked_pattern_matches_in_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY_LLAMA), "--ignore", "re:.*down_proj$", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    fates = {each["fate"] for each in planned["tensors"] if each["name"].endswith("down_proj.weight")}
    assert (fates, planned["warnings"]) == ({"dense, as asked"}, [])


def test_a_scheme_for_the_head_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY_LLAMA), "--config", write("layers: [{match: lm_head, bits: 8}]")]) == 2
    assert "only linears inside the blocks are quantized" in capsys.readouterr().err


def test_an_empty_config_file_changes_nothing(asked: Asked) -> None:
    assert asked("model", "-o", "out", "--config", write("# nothing yet\n")) == DEFAULT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitz: 4", "did you mean 'bits'?"),
        ("version: 4", "run.yaml: there is no 'version'"),
        ("bits: four", "run.yaml: bits: expected a whole number, got 'four'"),
        ("bits: 4\nwbits: 4", "given twice"),
        ("bits: 4\nbits: 3", "given twice"),
        ("sym: true\nasym: true", "not together with asym"),
        ("sym: maybe", "sym: expected true or false"),
        ("strict: 1", "run.yaml: strict: expected true or false"),
        ("- bits", "does not hold names and values"),
        ("bits: [4", "run.yaml is not YAML"),
        ("bits: !!python/object/apply:os.getcwd []", "run.yaml is not YAML"),
        ("layers: {match: x}", "layers: expected a list"),
        ("layers: [{bits: 8}]", "has no 'match'"),
        ("layers: [{match: x}]", "nothing is set"),
        ("layers: [{match: x, bitz: 8}]", "did you mean 'bits'?"),
        ("layers: [{match: x, bits: 7}]", "7 bits are not supported"),
        ("layers: [{match: x, bits: a}]", "layers, match 'x': expected a whole number"),
        ("layers: [{match: x, dense: true, bits: 8}]", "'dense' leaves nothing to set"),
        ("layers: [{match: '(', bits: 8}]", "not a regular expression"),
    ],
)
def test_a_wrong_config_file(refused: Refused, text: str, said: str) -> None:
    assert said in refused("model", "-o", "out", "--config", write(text))


def test_a_config_file_that_is_no_text(refused: Refused) -> None:
    Path("run.yaml").write_bytes(b"bits: \xff\xfe")
    assert "run.yaml is not YAML" in refused("model", "-o", "out", "--config", "run.yaml")


def test_desc_act_is_answered_rather_than_ignored(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    asked("model", "-o", "out", "--desc-act")
    assert "--desc-act has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan"], ["quantize", "--dry-run", "-o", "out"]])
def test_a_plan_names_every_tensor(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, str(TINY_LLAMA), "--scheme", "W3A16"]) == 0
    captured = capsys.readouterr()
    assert "W3A16 g128" in captured.out
    assert captured.err == ""
    assert main([*command, str(TINY_LLAMA), "--scheme", "W3A16", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["tensors"]) == 56
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_out_looks_at_the_disk_of_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Also from inside the model's folder, where an output must never go."""
    monkeypatch.chdir(TINY_LLAMA)
    assert main(["plan", "."]) == 0
    assert str(TINY_LLAMA.parent) in capsys.readouterr().out


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(TINY_LLAMA)]) == 0
    assert "5.77 M" in capsys.readouterr().out
    assert main(["inspect", str(TINY_LLAMA), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 5_770_496


def test_inspect_and_verify_of_what_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert main(["verify", str(tmp_path / "none")]) == 3
    assert "none" in capsys.readouterr().err


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmpare.compress.checkpoint.manifest import build_manifest, signed

    (tmp_path / "file").write_bytes(b"as it was")
    manifest = build_manifest(tmp_path, spec={}, source={}, versions={}, tensors={})
    (tmp_path / "manifest.json").write_bytes(signed(manifest))
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert main(["verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 1
    (tmp_path / "file").write_bytes(b"as it is!")
    assert main(["verify", str(tmp_path)]) == 3
    assert "file' is damaged" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llmpare 0.")
    assert main(["--json"]) == 2


@pytest.mark.parametrize("command", ["quantize", "plan", "evaluate", "inspect", "verify"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: llmpare" in text
    assert "\x1b" not in text
