"""Pages without their drawings, for tests that say nothing of them: drawing takes most of a tiny run's time."""

from collections.abc import Callable

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def blank(paint: Callable[[Axes], None], name: str, *, height: int = 0) -> Markup:
    """In place of page.svg.draw: what there is to draw is painted, so that it can fail, but never laid out."""
    paint(Figure().add_subplot())
    return Markup("<svg></svg>")
