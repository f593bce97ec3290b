"""The rules of the house, checked on the sources: who may import whom, who prints, who catches, what help costs."""

import ast
import importlib.metadata
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from llmpare.cli import settings
from llmpare.compress.prune import METHODS as PRUNING
from llmpare.compress.quantize import METHODS
from llmpare.compress.version import VERSION

ROOT = Path(__file__).parents[1]
FOLDERS = ("cli", "compress", "calibration_data")
HEAVY = ("torch", "transformers", "numpy", "accelerate", "datasets", "compressed_tensors", "pyarrow")
WORK = ("llmpare.compress.engine", "llmpare.compress.plan", "llmpare.compress.quantize", "llmpare.compress.run")


def module_name(path: Path) -> str:
    parts = ("llmpare", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported somewhere below `tree`; 'from a import b' counts as a.b when that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES else node.module


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not inside functions, not `if TYPE_CHECKING`."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If):
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                pending += node.body
            pending += node.orelse
        elif isinstance(node, ast.ClassDef | ast.With | ast.Try):
            pending += node.body
        else:
            yield node


def below(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def modules_below(package: str) -> dict[str, ast.Module]:
    found = {name: tree for name, tree in SOURCES.items() if below(package, name)}
    assert found, f"{package} is gone: this rule checks nothing"
    return found


def offenders(package: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, tree in modules_below(package).items()
        for other in imported(tree)
        if any(below(each, other) for each in forbidden)
    ]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("llmpare.compress", ("llmpare.cli", "typer", "rich", "click")),
        ("llmpare.calibration_data", ("llmpare.cli", "torch", "transformers")),
        # The command line holds no logic: nothing of it needs a tensor.
        ("llmpare.cli", (*HEAVY, "safetensors")),
        # Files and bytes: nothing of models, methods or formats.
        (
            "llmpare.compress.checkpoint",
            ("llmpare.compress.model", "llmpare.compress.formats", "llmpare.compress.report", *WORK, "transformers"),
        ),
        # Layouts of tensors: nothing of how the codes were found.
        ("llmpare.compress.formats", (*WORK, "transformers")),
        ("llmpare.compress.report", (*HEAVY, *WORK)),
        ("llmpare.compress.inspect", (*HEAVY, *WORK)),
    ],
)  # fmt: skip
def test_layers(package: str, forbidden: tuple[str, ...]) -> None:
    assert offenders(package, forbidden) == []


QUANTIZE = "llmpare.compress.quantize"
NAMED = {name.partition(":")[0] for m in METHODS.values() for name in (m.solver, m.tuner) if name}
PRUNE = "llmpare.compress.prune"
MASKS = {method.solver.partition(":")[0] for method in PRUNING.values()} | {"masks", "pruned", "refit", "joint"}
DISTILL = "llmpare.compress.distill"
ALGORITHMS = (
    f"{DISTILL}.losses",
    "llmpare.compress.grid",
    "llmpare.compress.lines",
    *(f"{QUANTIZE}.{name}" for name in sorted({*NAMED, "linalg", "refine"})),
    *(f"{PRUNE}.{name}" for name in sorted(MASKS)),
)
MATHS = ("torch", "numpy", "math", "collections", "dataclasses", "itertools", "typing")


@pytest.mark.parametrize("module", ALGORITHMS)
def test_algorithms_are_pure_tensor_maths(module: str) -> None:
    """They know tensors, the number grid, how much to take at once and each other: no model, no file, no logging."""
    allowed = (*MATHS, *ALGORITHMS, "llmpare.compress.batches")
    others = [other for other in imported(SOURCES[module]) if not any(below(each, other) for each in allowed)]
    assert others == []


def test_no_import_circles() -> None:
    graph = {
        name: {other for node in at_import_time(tree) for other in imported(node) if other in SOURCES} - {name}
        for name, tree in SOURCES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


# The child in which chat templates are rendered answers on its own stdout, which is a pipe to its parent.
WRITERS = ("llmpare.cli.output", "llmpare.cli.exits", "llmpare.compress.chat")


def test_only_output_prints() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if name not in WRITERS
        and (
            (isinstance(node, ast.Name) and node.id == "print")
            or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"))
        )
    ]
    assert found == []


def test_only_exits_catches_everything() -> None:
    def broad(handler: ast.ExceptHandler) -> bool:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        return any(
            kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds
        )

    found = [
        f"{name}:{node.lineno}"
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and broad(node)
    ]
    assert [place.split(":")[0] for place in found] == ["llmpare.cli.exits"]


def test_no_reflection() -> None:
    found = [
        f"{name}:{node.lineno}: {node.func.id}"
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "setattr", "hasattr", "eval", "exec", "globals")
    ]
    assert found == []


def test_the_environment_is_read_at_the_edge() -> None:
    found = [
        name
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert set(found) <= {"llmpare.cli.exits"}


@pytest.mark.parametrize(
    "module", ["cli.exits", "compress.plan", "compress.distill.plan", "compress.inspect", "compress.report.markdown"]
)
def test_what_must_be_instant_imports_nothing_heavy(module: str) -> None:
    script = f"import sys, llmpare.{module}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []


LIBRARIES = ("-c", "import typer, rich.console, rich.panel, rich.table")
"""What every command of this kind pays before its own work begins: the yardstick for the two tests below. On a
machine where it takes 0.09 s, --help takes 0.2 s and `plan` 0.22 s; a limit in seconds would be the machine's."""


def cpu_seconds(*arguments: str) -> float:
    """User and system time of `python ARGUMENTS`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def least_cpu_seconds(*arguments: str) -> float:
    """Of six runs."""
    return min(cpu_seconds(*arguments) for _ in range(6))


@pytest.fixture(scope="module")
def libraries() -> float:
    return least_cpu_seconds(*LIBRARIES)


@pytest.mark.parametrize(
    "command", [["--help"], ["quantize", "--help"], ["evaluate", "--help"], ["prune", "--help"], ["distill", "--help"]]
)
def test_help_is_instant(command: list[str], libraries: float) -> None:
    assert least_cpu_seconds("-m", "llmpare.cli", *command) < 4 * libraries


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_what_reads_only_headers_is_instant(command: str, libraries: float) -> None:
    model = str(ROOT / "examples" / "tiny-llama")
    assert least_cpu_seconds("-m", "llmpare.cli", command, model) < 5 * libraries


@pytest.mark.parametrize(
    ("commands", "table", "file_only"),
    [
        (("quantize", "plan"), settings.QUANTIZE, {"layers"}),
        (("evaluate",), settings.EVALUATE, set()),
        (("distill",), settings.DISTILL, set()),
    ],
)
def test_every_flag_can_be_read_and_every_setting_has_a_flag(
    commands: tuple[str, ...], table: settings.Parsers, file_only: set[str]
) -> None:
    import typer.main

    from llmpare.cli.app import app

    there = typer.main.get_command(app).commands
    named = {settings.canonical(parameter.name) for name in commands for parameter in there[name].params}
    assert named - {"config", "help"} == table.keys() - file_only


def test_reports_and_the_wheel_name_the_same_version() -> None:
    """As installed, which is what `pip show` tells a user; stale metadata means the package must be installed anew."""
    assert importlib.metadata.version("llmpare") == VERSION


def test_the_wheel_has_every_package_there_is() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    there = {module_name(path) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    assert set(listed) == there


def test_constraints_cover_what_the_project_asks_for() -> None:
    """And pyproject.toml holds lower bounds only: we must fit beside the tools people already have."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    asked = project["dependencies"] + [each for extra in project["optional-dependencies"].values() for each in extra]
    names = []
    for requirement in asked:
        name, bound, version = requirement.partition(">=")
        assert bound, requirement
        assert version.replace(".", "").isdecimal(), requirement
        names.append(name)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    assert {name.lower() for name in names} <= pinned
    assert not [line for line in pins if "/" in line or "+" in line]
