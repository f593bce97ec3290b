"""How models are told apart in drawings: by colour, dash and marker, the same in every drawing of a page."""

from dataclasses import dataclass

from llmpare.compress.report.page import svg
from llmpare.compress.report.page.parts import Legend

DASHES = ("", "6 3", "2 2.5", "8 3 2 3")
MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-4-4h8v8h-8z",
    "^": "M-4 4L0-4L4 4z",
    "D": "M-4 0L0-4L4 0L0 4z",
    "v": "M-4-4L0 4L4-4z",
    "P": "M-1.5-4h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
    "X": "M-4-4h3L0-2L1-4h3L2 0L4 4h-3L0 2L-1 4h-3L-2 0z",
    "*": "M0-4L1-1h3L1.5 1L2.5 4L0 2.2L-2.5 4L-1.5 1L-4-1h3z",
}
"""matplotlib's names of markers, with the paths that stand for them in a legend."""


@dataclass(frozen=True)
class Look:
    """How one model is drawn in every figure: no two of the first 32 are alike, with colours or without."""

    role: str
    dash: str
    marker: str

    @classmethod
    def of(cls, index: int) -> "Look":
        turn = index // svg.SERIES
        return cls(
            f"series-{index % svg.SERIES + 1}",
            DASHES[(index + turn) % len(DASHES)],
            list(MARKERS)[(index + turn) % len(MARKERS)],
        )

    @property
    def color(self) -> str:
        return svg.color(self.role)

    @property
    def line(self) -> tuple[float, tuple[float, ...] | None]:
        """The dash pattern in matplotlib's terms: offset, and lengths in line widths, which are 2."""
        return 0, tuple(float(length) / 2 for length in self.dash.split()) or None

    def legend(self, text: str, *, dot: bool = False) -> Legend:
        """text: of a model, shown as it is. dot: the drawing has dots and no line."""
        return Legend(svg.label(text), self.role, self.dash, MARKERS[self.marker] if dot else "")


ORIGINAL = Look("muted", "", "o")
"""The baseline, which is no candidate."""
