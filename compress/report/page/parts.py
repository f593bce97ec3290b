"""What a page is made of. Plain data: the template decides how it looks, and escapes every text in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its text. tone: 'good', 'bad', 'code' or 'quiet'."""

    text: str
    tone: str = ""
    note: str = ""  # small print beside it


@dataclass(frozen=True)
class Table:
    """caption: what the table shows. numeric: the columns set in figures, by number. The first column names the row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    numeric: Sequence[int] = ()
    folded: bool = False  # shown when asked for
    kind: str = "table"


@dataclass(frozen=True)
class Legend:
    """What a line or a dot of a drawing stands for.

    role: its colour. dash: an SVG dash pattern of its line. marker: the SVG path of its dot, within ±4; no line then.
    """

    text: str
    role: str
    dash: str = ""
    marker: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing. title: what it shows; says: what is to be seen in it, in words, also for those who cannot see it."""

    title: str
    drawing: Markup
    says: str
    legend: Sequence[Legend] = ()
    kind: str = "figure"


@dataclass(frozen=True)
class Tile:
    """One headline figure. text: the figure; means: the figure in words; note: what it was measured from."""

    name: str
    text: str
    means: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    tiles: Sequence[Tile]
    kind: str = "tiles"


@dataclass(frozen=True)
class Quote:
    """A place in the text where a model departs from the original."""

    context: str
    expected: str
    got: str
    true: str  # what the text goes on with
    kl: str
    place: str


@dataclass(frozen=True)
class Quotes:
    caption: str
    quotes: Sequence[Quote]
    kind: str = "quotes"


@dataclass(frozen=True)
class Prose:
    """Paragraphs; code: shown as lines of code after them."""

    paragraphs: Sequence[str]
    code: str = ""
    kind: str = "prose"


@dataclass(frozen=True)
class Points:
    """A list of remarks."""

    points: Sequence[str]
    tone: str = ""
    kind: str = "points"


Item = Table | Figure | Tiles | Quotes | Prose | Points


@dataclass(frozen=True)
class Section:
    """anchor: its id on the page. Items in a row are set side by side when they are figures."""

    anchor: str
    title: str
    items: Sequence[Item]
    lead: str = ""

    @property
    def runs(self) -> list[tuple[str, list[Item]]]:
        """Neighbours of one kind together."""
        return [(kind, list(items)) for kind, items in groupby(self.items, key=lambda item: item.kind)]


@dataclass(frozen=True)
class Page:
    eyebrow: str
    title: str
    passed: bool
    verdict: str  # 'Passed', 'Not passed'
    lead: str  # the outcome in one sentence
    reasons: Sequence[str] = field(default_factory=tuple)  # why it did not pass
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""
