"""The models of an evaluation, opened and looked at before any of them is run."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpare.compress.calibration import DEFAULT_SEQLEN
from llmpare.compress.checkpoint import locate
from llmpare.compress.checkpoint.files import shown
from llmpare.compress.errors import UsageError
from llmpare.compress.evaluate.request import EvaluateRequest
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.model.layout import decoder_config, find
from llmpare.compress.refusals import refuse_code
from llmpare.compress.tokenizer import load_tokenizer, tokenizer_files


@dataclass(frozen=True)
class Subject:
    """One model, open. given: as it was named. name: short, for tables. tokenizer: None if it has none."""

    given: str
    name: str
    source: DenseSource
    tokenizer: Any

    @property
    def longest(self) -> int:
        """Tokens the model allows."""
        return int(self._setting("max_position_embeddings", "n_positions", default=DEFAULT_SEQLEN))

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding."""
        return int(self._setting("vocab_size", default=0))

    @property
    def architecture(self) -> str:
        """The name of its class in transformers."""
        return str((self.source.config.get("architectures") or ["unknown"])[0])

    @property
    def dtype(self) -> str:
        """The precision that most of it is used in, as safetensors spells it."""
        counts: Counter[str] = Counter()
        for info in self.source.tensors.values():
            if info.dtype in ("F32", "F16", "BF16"):
                counts[info.dtype] += info.numel
        return counts.most_common(1)[0][0] if counts else "F32"

    def describe(self) -> dict[str, Any]:
        """The report's section on a model; reads what no one has read yet, for the digest."""
        return {
            "model": self.given,
            "architecture": self.architecture,
            "scheme": self.source.scheme,
            "weight_bytes": self.source.weight_bytes,
            "parameters": self.source.parameters,
            "weights_sha256": digest(self.source),
        }

    def _setting(self, *names: str, default: int) -> Any:
        return find(decoder_config(self.source.config), *names, default=default)


def digest(source: DenseSource) -> str:
    """One sha256 for all weights as they are stored."""
    checkpoint = source.checkpoint
    checkpoint.hash()
    text = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(checkpoint.digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def locate_baseline(request: EvaluateRequest) -> Path | None:
    """The folder of the baseline, be it a model or saved predictions. Raises UsageError if there is none."""
    if request.baseline is None:
        return None
    try:
        return locate.resolve(request.baseline, revision=request.revision)
    except UsageError as error:
        raise UsageError(f"--baseline: {error.message}", error.hint) from error


def open_subjects(
    request: EvaluateRequest, baseline: Path | None, stack: ExitStack
) -> tuple[Subject | None, list[Subject]]:
    """The baseline, if `baseline` is the folder of one, and the candidates, open for as long as `stack` is."""
    folders = [locate.resolve(model, revision=request.revision) for model in request.models]
    names = _short_names(request.models, folders)
    candidates = [
        _open(given, name, folder, request, stack)
        for given, name, folder in zip(request.models, names, folders, strict=True)
    ]
    if baseline is None:
        return None, candidates
    return _open(str(request.baseline), baseline.resolve().name, baseline, request, stack), candidates


def _short_names(given: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The last part of what was given where that is enough to tell all apart, else all of it."""
    short = [Path(each).name or folder.resolve().name for each, folder in zip(given, folders, strict=True)]
    if len(set(given)) < len(given):
        twice = Counter(given).most_common(1)[0][0]
        raise UsageError(f"{shown(twice)} is named twice", "name every model once")
    return short if len(set(short)) == len(short) else list(given)


def _open(given: str, name: str, folder: Path, request: EvaluateRequest, stack: ExitStack) -> Subject:
    source = stack.enter_context(open_dense(folder))
    refuse_code(given, source.config, trusted=request.trust_remote_code)
    tokenizer = None
    if tokenizer_files(folder):
        tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
    return Subject(given, name, source, tokenizer)
