"""report.html: one page that needs no network, light or dark as the reader's system is."""

from collections.abc import Mapping
from importlib import resources
from typing import Any


def render(report: Mapping[str, Any]) -> str:
    """The whole page. report: as schema.json says, of any command, fresh or read back.

    Every text of the report is escaped: what a model wrote is shown, never acted on. The same report gives the same
    bytes. matplotlib and jinja2 are imported here and nowhere earlier.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from llmpare.compress.report.page import about, accuracy, blocks, distillation, pruning, speed, summary, words

    files = resources.files("llmpare.compress.report.page")
    environment = Environment(
        autoescape=True,
        finalize=words.visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tied"] = words.tied
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    chapters = (summary, pruning, distillation, accuracy, speed, blocks, about)
    sections = [section for chapter in chapters for section in chapter.sections(report)]
    return template.render(
        style=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        page=summary.page(report, sections, about.footer(report)),
    )
