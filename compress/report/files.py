"""The files that a report lies in, beside what it is about."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.files import write_file
from llmpare.compress.report import build, html, markdown

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
REPORTS = (JSON, MARKDOWN, HTML)


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Each appears whole or not at all, report.json last. Raises OutputError."""
    write_file(folder / HTML, html.render(report).encode())
    write_file(folder / MARKDOWN, markdown.render(report).encode())
    write_file(folder / JSON, build.encode(report))


def read(folder: Path) -> dict[str, Any]:
    """The report in a folder that `write` has been at."""
    report: dict[str, Any] = json.loads((folder / JSON).read_bytes())
    return report
