"""A matplotlib drawing as inline SVG: its text is text, its colours are the page's, its bytes always the same.

Colours are drawn as stand-ins, one per role, and become CSS variables afterwards. So one drawing serves the light
and the dark page.
"""

import logging
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from llmpare.compress.report import show

SERIES = 8
"""Colours that tell models apart; later ones take them again with another dash and marker."""

ROLES = ("ink", "muted", "rule", "paper", "good", "bad", *(f"series-{i}" for i in range(1, SERIES + 1)))
_STAND_INS = {f"#0000{i:02x}": role for i, role in enumerate(ROLES, start=1)}

WIDTH, HEIGHT = 390, 240
"""Units of a drawing: CSS pixels where the column is that wide."""

_POINTS = 72  # matplotlib's SVG has 72 units per inch
_TIP = "tip:"


def color(role: str) -> str:
    """What to draw with, so that the page decides how `role` looks."""
    return f"#0000{ROLES.index(role) + 1:02x}"


def label(text: str) -> str:
    """text of a model or a user, fit for a drawing."""
    return show.printable(text)


def tip(artist: Artist, text: str) -> None:
    """Shows text when the pointer rests on the artist."""
    artist.set_gid(_TIP + label(text))


def draw(paint: Callable[[Axes], None], name: str, *, height: int = HEIGHT) -> Markup:
    """The SVG of what `paint` does to a pair of axes.

    name: unique on the page, the prefix of ids inside the drawing. The drawing is hidden from screen readers: whoever
    puts it on a page says in words what it shows.
    """
    # A user's matplotlibrc must not change the page, nor a missing glyph or a font cache print on stderr.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(name))  # type: ignore[arg-type]  # its keys are literals
        figure = Figure(figsize=(WIDTH / _POINTS, height / _POINTS), layout="constrained")
        axes = figure.add_subplot()
        for background in (figure.patch, axes.patch):
            background.set_visible(False)
        paint(axes)
        file = BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _inline(ElementTree.fromstring(file.getvalue()), WIDTH, height)


def _style(name: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": f"llmpare {name}",
        "text.parse_math": False,  # a model may be called $x$
        "axes.formatter.use_mathtext": False,
        "font.size": 11.5,
        "axes.labelsize": 11.5,
        "axes.labelcolor": color("muted"),
        "axes.edgecolor": color("rule"),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": color("rule"),
        "grid.linewidth": 1,
        "text.color": color("ink"),
        "xtick.color": color("muted"),
        "ytick.color": color("muted"),
        "xtick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 2,
        "lines.markersize": 5.5,
        "patch.linewidth": 0,
        "figure.constrained_layout.w_pad": 0.02,
        "figure.constrained_layout.h_pad": 0.02,
    }


def _inline(root: ElementTree.Element, width: int, height: int) -> Markup:
    """matplotlib's document as an element of a page: no ids that clash, no style that leaks, no namespaces."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if element.tag == "g":
            named = attributes.pop("id", "")
            if named.startswith(_TIP):
                title = ElementTree.Element("title")
                title.text = named.removeprefix(_TIP)
                element.insert(0, title)
        if "style" in attributes:
            attributes["style"] = _themed(attributes["style"])
        element.attrib.clear()
        element.attrib.update(attributes)
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "aria-hidden": "true", "focusable": "false"})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _themed(style: str) -> str:
    """A style with stand-ins turned into the page's colours, without the font, which is the page's too."""
    for stand_in, role in _STAND_INS.items():
        style = style.replace(stand_in, f"var(--{role})")
    return "; ".join(part for part in style.split("; ") if not part.startswith("font-family:"))
