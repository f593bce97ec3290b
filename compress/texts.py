"""The two texts of a run: the one it learns from and the one it is judged by."""

from dataclasses import dataclass
from typing import Any

from llmpare.compress import calibration
from llmpare.compress.calibration import Windows
from llmpare.compress.planning import Plan
from llmpare.compress.request import NO_TEXT
from llmpare.compress.tokenizer import load_tokenizer

OVERLAP_LIMIT = 0.01  # share of the evaluation text that calibration may know before the figures flatter


@dataclass(frozen=True)
class Texts:
    """The windows of a run. calibration is None for a method that is to do without. overlap: share, 0…1."""

    calibration: Windows | None
    evaluation: Windows
    overlap: float

    def spec(self) -> dict[str, Any]:
        """What decides the bytes of an output, as far as these texts do."""
        found: dict[str, Any] = {"calibration_sha256": None, "calibration_ids_sha256": None}
        for part, windows in ("calibration", self.calibration), ("evaluation", self.evaluation):
            if windows is not None:
                ids = calibration.ids_sha256(windows.ids)
                found |= {f"{part}_sha256": windows.source["sha256"], f"{part}_ids_sha256": ids}
        return found

    def warnings(self) -> list[str]:
        """What makes the figures of a run with these texts less than they seem."""
        found = []
        if self.calibration is not None and self.calibration.source["short"]:
            windows, length = self.calibration.ids.shape
            found.append(f"the calibration text gives only {windows} windows of {length} tokens")
        if self.overlap > OVERLAP_LIMIT:
            share = f"{self.overlap:.0%} of the evaluation text"
            found.append(f"{share} is also in the calibration text: the figures flatter")
        return found


def read_texts(plan: Plan) -> Texts:
    """Both texts, cut into windows. Raises InputError for a tokenizer or a text that cannot be used."""
    request = plan.request
    tokenizer = load_tokenizer(plan.model, trust_remote_code=request.trust_remote_code)
    limits: dict[str, Any] = {"vocab_size": plan.vocabulary, "max_length": plan.longest}
    learned = None
    if request.calibration.dataset != NO_TEXT:
        learned = calibration.load(request.calibration, tokenizer, part="calibration", **limits)
    watched = calibration.load(request.evaluation, tokenizer, part="evaluation", **limits)
    return Texts(learned, watched, calibration.overlap(learned, watched) if learned else 0.0)
