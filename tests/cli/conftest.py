import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
HARNESS = Path(__file__).with_name("harness.py")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `llmpare ARGUMENTS` in an empty folder, with an engine that behaves as told (see harness.py)."""

    def start(
        behaviour: str, *arguments: str, environment: Mapping[str, str] = {}, **popen: Any
    ) -> "subprocess.Popen[str]":
        clean = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        path = os.pathsep.join(filter(None, (str(TESTS), clean.get("PYTHONPATH"))))
        variables = clean | {"PYTHONPATH": path, "LC_ALL": "C.UTF-8"} | environment
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        command = [sys.executable, str(HARNESS), behaviour, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=variables, encoding="utf-8", **streams)

    return start


@pytest.fixture
def llmpare(start: Start) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run it to its end."""

    def run(behaviour: str, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        process = start(behaviour, *arguments, **options)
        stdout, stderr = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run
