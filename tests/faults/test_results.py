"""Rows 41 to 44: a finished output, its gates, its bytes, and who reads the result."""

import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from faults.kit import Llmpare, flip_bit, identity, place, refused, report, with_value


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "in tensor 'model.layers.0.mlp.up_proj.weight_packed'"),
        ("config.json", "its sha256 is not that of the manifest"),
        ("tokenizer.json", "its sha256 is not that of the manifest"),
        ("manifest.json", ""),
    ],
)
def test_41_one_bit_flipped(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, name: str, said: str) -> None:
    command = tiny.quantize(model, out, text)
    assert llmpare(command).code == 0
    assert llmpare(["verify", str(out)]).code == 0
    flip_bit(out / name, place(out, "model.layers.0.mlp.up_proj.weight_packed") if said.startswith("in tensor") else 9)
    before = tiny.contents(out)
    refused(llmpare, ["verify", str(out)], 3, str(out / name), said)
    again = llmpare(command)
    assert again.code == (5 if name == "manifest.json" else 3), "nor does the same command take it for finished"
    assert tiny.contents(out) == before


GATES = {
    "--max-kl": ("1e-6", "10"),
    "--max-perplexity-increase": ("0%", "1000%"),
    "--min-agreement": ("100%", "1%"),
    "--max-size": ("1MB", "1GB"),
}


@pytest.mark.parametrize("gate", GATES)
def test_42_gates(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, gate: str) -> None:
    tight, loose = GATES[gate]
    options = "--bits", "2", "--method", "rtn", gate
    held = llmpare(tiny.quantize(model, out, text, *options, loose))
    assert held.code == 0
    assert report(out)["passed"] is True
    judged_anew = llmpare(tiny.quantize(model, out, text, *options, tight))
    failed = llmpare(tiny.quantize(model, out.with_name("failed"), text, *options, tight))
    for ended in (judged_anew, failed):
        assert ended.code == 4
        assert re.search(rf"error: {gate[2:]}: \S+.*, the limit is ", ended.err)
    assert failed.out == f"{out.with_name('failed')}\n"
    assert report(out.with_name("failed"))["passed"] is False
    assert tiny.contents(out.with_name("failed")) == tiny.contents(out)


@pytest.mark.parametrize("gates", [(), ("--max-perplexity-increase", "5%")], ids=["no gate", "gate"])
def test_42_perplexity_is_not_a_number(
    llmpare: Llmpare, tmp_path: Path, out: Path, text: tiny.Text, gates: tuple[str, ...]
) -> None:
    """A model that cannot be measured has not been shown to be good, gate or no gate."""
    model = tiny.llama(tmp_path / "model", changes={"lm_head.weight": with_value(math.nan)})
    command = tiny.quantize(model, out, text, "--allow-nonfinite", *gates)
    for _ in range(2):
        ended = llmpare(command)
        assert ended.code == 4
        assert "not finite" in ended.err
        assert ended.out == f"{out}\n"
        assert report(out)["passed"] is False
        assert report(out)["fidelity"]["perplexity"]["dense"] is None


def llmpare_process(arguments: list[str], cwd: Path, umask: int = 0o022, **environment: str) -> tiny.Ended:
    """The command line in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "llmpare.cli", *arguments],
        cwd=cwd,
        umask=umask,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=60,
    )
    return tiny.Ended(ended.returncode, ended.stdout.decode("ascii"), ended.stderr.decode("ascii"))


def test_43_same_command_same_bytes(
    model: Path, tmp_path: Path, out: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    command = tiny.quantize(model, out, text)
    ended = llmpare_process(command, tmp_path, 0o027, TZ="Asia/Kathmandu", LC_ALL="tr_TR.UTF-8", PYTHONHASHSEED="7")
    assert ended.code == 0, ended.err
    assert tiny.contents(out) == undisturbed
    for path in (out, *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_43_a_finished_output_is_verified_and_kept(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llmpare(tiny.quantize(model, out, text)).code == 0
    before = {path: identity(path) for path in (out, *out.rglob("*"))}
    monkeypatch.chdir(out.parent)
    again = llmpare(tiny.quantize(model, "w4", text))
    assert (again.code, again.out) == (0, "w4\n")
    assert "verifying" in again.err
    assert "block" not in again.err
    assert {path: identity(path) for path in (out, *out.rglob("*"))} == before


def test_43_a_finished_output_says_what_the_gates_of_the_last_run_say(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text
) -> None:
    """Whoever reads its report later must not find another verdict than the exit code."""
    assert llmpare(tiny.quantize(model, out, text)).code == 0
    for gate, code in (("1e-9", 4), ("1000", 0)):
        assert llmpare(tiny.quantize(model, out, text, "--max-kl", gate)).code == code
        report = json.loads((out / "report.json").read_bytes())
        assert (report["passed"], [each["passed"] for each in report["gates"]]) == (code == 0, [code == 0])
        assert ("**Passed.**" in (out / "report.md").read_text()) == (code == 0)
        assert llmpare(["verify", str(out)]).code == 0


def test_43_what_changes_no_byte_changes_nothing(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    """A finished output is that of the same settings said in other words, whatever a desktop has left in it."""
    assert llmpare(tiny.quantize(model, out, text, "--device", "auto", "--dtype", "auto")).code == 0
    precision = json.loads((out / "report.json").read_text())["fidelity"]["dtype"].removeprefix("torch.")
    (out / ".DS_Store").write_bytes(b"x")
    (out / ".cache").mkdir()
    (out / ".cache" / "file").write_bytes(b"x")
    others = ("--device", "cpu", "--dtype", precision, "--trust-remote-code", "--max-memory", "100GB")
    again = llmpare(tiny.quantize(model, out, text, *others))
    assert (again.code, "block" in again.err) == (0, False), again.err
    assert llmpare(["verify", str(out)]).code == 0


@pytest.mark.parametrize(("stdout", "code"), [("|", 141), ("/dev/full", 5)])
def test_44_nobody_takes_the_result(
    zygote: tiny.Zygote,
    model: Path,
    out: Path,
    text: tiny.Text,
    undisturbed: dict[str, bytes],
    stdout: str,
    code: int,
) -> None:
    ended = zygote.run(tiny.quantize(model, out, text), stdout=stdout)
    assert ended.code == code
    assert f"complete: {out}" in ended.err
    assert tiny.contents(out) == undisturbed


def test_44_ascii_locale(model: Path, tmp_path: Path, text: tiny.Text) -> None:
    out = tmp_path / "größe"
    old = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    ended = llmpare_process(tiny.quantize(model, out, text, "--method", "rtn"), tmp_path, **old)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"{tmp_path}/gr\\")
    assert report(out)["passed"] is True
