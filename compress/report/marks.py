"""Markdown of a report, where foreign text is shown as code or escaped and never acts as Markdown or HTML."""

import re
from collections.abc import Iterable, Sequence

from llmpare.compress.report import show


def code(text: str) -> str:
    """text as a code span that also holds inside a table cell."""
    text = show.printable(text).replace("|", "\\|")
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if runs else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def plain(text: str) -> str:
    """text as running text, with every character that Markdown or HTML would act on escaped."""
    return re.sub(r"([\\`*_\[\]<>|~&#!])", r"\\\1", show.printable(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> list[str]:
    """A table; `right` holds the numbers of the columns that are aligned to the right ('12')."""
    rule = ["---:" if str(i) in right else "---" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
