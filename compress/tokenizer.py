"""The tokenizer in a model folder, or what is wrong with it."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from llmpare.compress.errors import InputError


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in a model folder that a tokenizer can be loaded from."""
    patterns = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model folder. Raises InputError, naming the file, when it is missing or corrupt."""
    files = tokenizer_files(folder)
    hint = "copy the tokenizer files of the original model into the folder"
    if not files:
        raise InputError(f"{folder}: no tokenizer in the model folder, expected tokenizer.json", hint)
    for file in files:
        if file.suffix == ".json":
            _read_json(file, hint)
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in _read_json(settings, hint) and not trust_remote_code:
        # Not refused at once: transformers often has a class of its own for it.
        hint = "this tokenizer runs code from the model folder: read that code, then add --trust-remote-code"
    from transformers import AutoTokenizer

    with _CorruptTokenizer(files[0], hint):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is corrupt: {error}", hint) from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is corrupt: not a JSON object", hint)
    return content


class _CorruptTokenizer:
    """Turns what loading a damaged tokenizer raises into an InputError.

    The tokenizers library reports damage as a plain Exception, so that exact class is compared here: an
    except clause for it would catch everything.
    """

    def __init__(self, file: Path, hint: str) -> None:
        self.file = file
        self.hint = hint

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from huggingface_hub.errors import StrictDataclassError

        damage = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError)
        reason = " ".join(str(error).split())
        if isinstance(error, (ArithmeticError, StrictDataclassError)):  # loading a tokenizer looks at config.json too
            raise InputError(
                f"{self.file.with_name('config.json')} is no configuration of a model: {reason}"
            ) from error
        if kind is Exception or isinstance(error, damage):
            raise InputError(f"{self.file} cannot be loaded as a tokenizer: {reason}", self.hint) from error
