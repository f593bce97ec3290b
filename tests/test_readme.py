"""What the README tells people to put into CI does what it says, run as it stands there.

The commands are the README's own; only the sizes are made small, by a `llmpare` in front of the real one on PATH, and
`pip` does nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = """#!/bin/sh
case "$1" in
    quantize) exec "{python}" -m llmpare.cli "$@" --method rtn --dataset none --eval-nsamples 4 --seqlen 64 --quiet ;;
    evaluate) exec "{python}" -m llmpare.cli "$@" --nsamples 4 --seqlen 64 --quiet ;;
esac
exit 99
"""

pytestmark = pytest.mark.slow


def block(language: str, containing: str) -> str:
    """The one code block of the README in that language that holds the text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    (found,) = [code for code in blocks if containing in code]
    return str(found)


class Place:
    """A folder as somebody would have it: a model, and the commands of the README."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tools = folder / "tools"
        tools.mkdir()
        for name, text in (("llmpare", SMALL.format(python=sys.executable)), ("pip", "#!/bin/sh\n")):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        shutil.copytree(ROOT / "examples" / "tiny-llama", folder / "model")
        (folder / "Makefile").write_text(block("make", "accept:"))
        self.summary = folder / "summary.md"
        self.environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, encoding="utf-8", timeout=300
        )

    def step(self, script: str) -> subprocess.CompletedProcess[str]:
        """As GitHub runs a step."""
        return self.run("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script)


@pytest.fixture(scope="module")
def job() -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = yaml.safe_load(block("yaml", "actions/checkout"))["jobs"]["accuracy"]["steps"]
    return steps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """After `make accept`, which quantizes, evaluates and keeps the report."""
    made = Place(tmp_path_factory.mktemp("readme"))
    done = made.run("make", "accept")
    assert done.returncode == 0, done.stderr
    assert "--against" not in done.stdout, "there is nothing to compare with yet"
    assert json.loads((made.folder / "accuracy.json").read_text())["passed"]
    return made


def test_the_job_passes_and_leaves_what_it_uploads(place: Place, job: list[dict[str, Any]]) -> None:
    place.summary.unlink(missing_ok=True)
    shutil.rmtree(place.folder / "out" / "accuracy")
    scripts = [step["run"] for step in job if "run" in step]
    assert [script.split()[0] for script in scripts] == ["pip", "llmpare", "llmpare"]
    for script in scripts:
        done = place.step(script)
        assert done.returncode == 0, f"{script}\n{done.stderr}"
    report = json.loads((place.folder / "out/accuracy/report.json").read_text())
    names = {gate["name"] for gate in report["gates"]}
    assert {"max-kl", "min-agreement", "against-kl", "against-size"} <= names
    (upload,) = [step for step in job if "upload" in step.get("uses", "")]
    assert upload["if"] == "always()"
    for uploaded in upload["with"]["path"].split():
        assert (place.folder / uploaded).exists()
    assert {path.name for path in (place.folder / "out/accuracy").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
    }
    suites = ElementTree.parse(place.folder / "out/junit.xml").getroot()
    assert suites.attrib["failures"] == "0"
    assert int(suites.attrib["tests"]) == len(names) + 1
    assert "Passed" in place.summary.read_text()


def test_the_job_fails_when_the_model_got_worse(place: Place, job: list[dict[str, Any]]) -> None:
    accepted = place.folder / "accuracy.json"
    kept = accepted.read_text()
    better = json.loads(kept)
    better["candidates"][0]["fidelity"]["kl"] |= {"mean": 1e-5, "stderr": 1e-6}
    better["candidates"][0]["size"]["bytes"] -= 1
    accepted.write_text(json.dumps(better))
    evaluate = place.step(job[-2]["run"])
    accepted.write_text(kept)
    assert evaluate.returncode == 4
    assert "against-kl" in evaluate.stderr
    assert "against-size" in evaluate.stderr
    suites = ElementTree.parse(place.folder / "out/junit.xml").getroot()
    failed = [case.attrib["name"] for case in suites.iter("testcase") if case.find("failure") is not None]
    assert sorted(failed) == ["against-kl", "against-size"]


def test_make_compares_with_what_was_accepted(place: Place) -> None:
    done = place.run("make", "--dry-run", "accuracy")
    assert done.returncode == 0, done.stderr
    assert "--against accuracy.json" in done.stdout
    assert "quantize" not in done.stdout, "the output is up to date"
