"""The file of --config: YAML whose values reach the parsers of the flags as they are written.

YAML 1.1 would read the pattern 2:4 as the number 124, and the revision 0100 as 64.
"""

from pathlib import Path

import yaml

from llmpare.cli.settings import canonical
from llmpare.compress.errors import UsageError

_TAG = "tag:yaml.org,2002:"
_KEPT = (f"{_TAG}bool", f"{_TAG}null", f"{_TAG}merge")


class _Loader(yaml.SafeLoader):
    """Reads true, false and null; whatever else is no list and no mapping is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read(path: Path) -> dict[str, object]:
    """What the file says, by the names that flags have.

    Raises UsageError for a file that is missing, is not YAML, or gives a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content, node = yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "--config takes a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold names and values", "write one 'name: value' per line")
    keyed = {canonical(str(key)): value for key, value in content.items()}
    if len(keyed) < len(node.value):  # of a key that is written twice, the content holds the last alone
        raise UsageError(f"{path}: the same name is given twice, perhaps in two spellings")
    if "sym" in keyed:
        keyed["asym"] = _opposite(keyed, path)
    return keyed


def _opposite(keyed: dict[str, object], path: Path) -> bool:
    """asym for a file that says sym, which as flags are --asym and --sym."""
    value = keyed.pop("sym")
    if "asym" in keyed or not isinstance(value, bool):
        raise UsageError(f"{path}: sym: expected true or false, and not together with asym, got {value!r}")
    return not value
