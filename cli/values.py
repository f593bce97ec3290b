"""Values as people write them: '16GiB', '2%', '0.05'. Each parser raises ValueError with what it accepts."""

import math
import re

from llmpare.compress.request import AUTO

_UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def text(value: object) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or value == "":
        raise ValueError("expected text")
    return value


def path(value: object) -> str:
    """A path or a hub name. One that begins with '-' is far more often a flag whose value was forgotten before it."""
    if (result := text(value)).startswith("-"):
        raise ValueError("expected a path, and ./ in front of one that begins with '-'")
    return result


def flag(value: object) -> bool:
    """True or false, as YAML knows them."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def whole(value: object) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("expected a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("expected a whole number") from None


def group_size(value: object) -> int:
    """Columns per scale, -1 for one scale per row, or 'auto'. Which numbers there are is the scheme's to say."""
    if value == "auto":
        return AUTO
    try:
        size = whole(value)
    except ValueError:
        raise ValueError("expected a whole number or auto") from None
    if size == AUTO:
        raise ValueError("expected 32, 64, 128, -1 or auto")
    return size


def natural(value: object) -> int:
    """A whole number from 0."""
    number = whole(value)
    if number < 0:
        raise ValueError("expected a whole number from 0")
    return number


def positive(value: object) -> int:
    """A whole number from 1."""
    number = whole(value)
    if number < 1:
        raise ValueError("expected a whole number from 1")
    return number


def number(value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("expected a number")
    try:
        result = float(value)
    except ValueError:
        raise ValueError("expected a number") from None
    if not math.isfinite(result):
        raise ValueError("expected a finite number")
    return result


def limit(value: object) -> float:
    """A number from 0."""
    result = number(value)
    if result < 0:
        raise ValueError("expected a number from 0")
    return result


def strength(value: object) -> float:
    """A number from 0 to 1."""
    result = number(value)
    if not 0 <= result <= 1:
        raise ValueError("expected a number from 0 to 1")
    return result


def share(value: object) -> float:
    """A fraction: '2%' and '0.02' are the same. A bare 1 or more could mean either, and is refused."""
    expected = "expected a percentage such as 2% or a fraction such as 0.02"
    percent = re.fullmatch(r"\s*(.+?)\s*%\s*", value) if isinstance(value, str) else None
    try:
        result = number(percent[1]) / 100 if percent else number(value)
    except ValueError:
        raise ValueError(expected) from None
    if result < 0 or (percent is None and result >= 1):
        raise ValueError(expected)
    return result


def size(value: object) -> int:
    """Bytes: '16GiB' is 16·2³⁰, '4GB' and '4G' are 4·10⁹, a bare number is bytes."""
    expected = "expected a size such as 16GiB, 4GB or 500000000"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if isinstance(value, bool) or match is None or match[2].upper() not in _UNITS:
        raise ValueError(expected)
    result = round(float(match[1]) * _UNITS[match[2].upper()])
    if result < 1:
        raise ValueError(expected)
    return result


def count(value: object) -> int:
    """How many: '6B' is 6·10⁹, '350M' is 350·10⁶, a bare number is itself."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", str(value).upper())
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    if isinstance(value, bool) or match is None or (result := round(float(match[1]) * scale[match[2]])) < 1:
        raise ValueError("expected a count such as 6B, 350M or 1200000")
    return result


def numbers(value: object) -> tuple[int, ...]:
    """Whole numbers from 0 and ranges of them: '3', '20-27', '3,5,20-27'; each once, in order."""
    expected = "expected numbers and ranges such as 3,20-27"
    found: set[int] = set()
    for part in value if isinstance(value, list | tuple) else str(value).split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6}))?\s*", str(part))
        if isinstance(part, bool) or match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(expected)
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def texts(value: object) -> tuple[str, ...]:
    """One text, or a list of them."""
    return tuple(text(item) for item in (value if isinstance(value, list | tuple) else [value]))


def paths(value: object) -> tuple[str, ...]:
    """One path or hub name, or a list of them."""
    return tuple(path(item) for item in (value if isinstance(value, list | tuple) else [value]))


def names(value: object) -> tuple[str, ...]:
    """Names with commas between them, or a list of such."""
    found = tuple(name.strip() for item in texts(value) for name in item.split(","))
    if "" in found:
        raise ValueError("expected names with commas between them")
    return found


def positives(value: object) -> tuple[int, ...]:
    """Whole numbers from 1 with commas between them, or a list of such."""
    items = value if isinstance(value, list | tuple) else [value]
    parts = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    try:
        return tuple(positive(part) for part in parts)
    except ValueError:
        raise ValueError("expected whole numbers from 1 with commas between them") from None


def mappings(value: object) -> tuple[dict[str, object], ...]:
    """A list of entries with names and values."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("expected a list of entries with names and values")
    return tuple({str(name): item for name, item in entry.items()} for entry in value)


def device(value: object) -> str:
    """'auto', 'cpu', 'cuda' or 'cuda:N'."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return value


def dtype(value: object) -> str:
    """What the forward passes compute in; 'auto' is the model's own."""
    if value not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError("expected auto, float32, bfloat16 or float16")
    return str(value)
