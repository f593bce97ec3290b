"""Public data sets by short names, and any other data set of the hub by its full name.

Nothing here is imported or downloaded until the first row is asked for; `datasets` is an optional dependency.
"""

import difflib
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from types import ModuleType
from typing import Any

from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.hub import transport_error

PROBE_SECONDS = 5.0
BUNDLED_INSTEAD = "--dataset bundled needs no network"


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a split; None: to its end."""

    split: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class HubSource:
    """Where a data set is on the hub, and which of its rows serve which part.

    field: the column that holds the text or the messages; None leaves it to the shape of the row. streaming:
    rows are fetched as they are used, for sets too large to download. joined: the rows are lines of one text,
    not texts.
    """

    path: str
    config: str | None
    calibration: Rows
    evaluation: Rows
    field: str | None = None
    streaming: bool = True
    joined: bool = False


# Where a set has one split only, the evaluation part is its first rows and the calibration part begins after
# them. 10,000 lines of WikiText are 3 MB, hundreds of windows; joined, they are tokenized in one piece.
PRESETS = {
    "wikitext2": HubSource(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        Rows("train", 0, 10_000),
        Rows("test"),
        field="text",
        streaming=False,
        joined=True,
    ),
    "c4": HubSource("allenai/c4", "en", Rows("train"), Rows("validation"), field="text"),
    "pile": HubSource(
        "NeelNanda/pile-10k",
        None,
        Rows("train", 1000),
        Rows("train", 0, 1000),
        field="text",
        streaming=False,
    ),
    "ultrachat": HubSource("HuggingFaceH4/ultrachat_200k", None, Rows("train_sft"), Rows("test_sft"), field="messages"),
    "fineweb-edu": HubSource(
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        Rows("train", 2000),
        Rows("train", 0, 2000),
        field="text",
    ),
}


def rows(dataset: str, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a preset or of a hub data set 'org/name', 'org/name:config' or 'org/name:config:split'.

    part: 'calibration' or 'evaluation'; a hub set without a split named takes train for the one and test,
    validation or train for the other. Yields (place for messages, row). Raises UsageError for a name that is
    neither, InputError when `datasets` is missing, the hub cannot be reached, or it does not have the data
    set.
    """
    if dataset not in PRESETS and "/" not in dataset:
        raise UsageError(f"unknown data set {dataset!r}", _suggestion(dataset))
    if find_spec("datasets") is None:
        raise InputError(
            f"the data set {dataset!r} needs the package 'datasets', which is not installed",
            f"pip install 'llmpare[data]', or: {BUNDLED_INSTEAD}",
        )
    cached_only = offline(dataset, BUNDLED_INSTEAD)
    import datasets as hub

    try:
        source = PRESETS[dataset] if dataset in PRESETS else _hub_source(hub, dataset)
        wanted = source.calibration if part == "calibration" else source.evaluation
        # The cache holds whole data sets only; offline, streaming could not find anything.
        table = hub.load_dataset(
            source.path, source.config, split=wanted.split, streaming=source.streaming and not cached_only
        )
        selected = islice(table, wanted.start, wanted.stop)
        if source.joined:
            yield dataset, {"text": "\n\n".join(row[source.field] or "" for row in selected)}
            return
        for number, row in enumerate(selected, wanted.start):
            yield (
                f"{dataset}, row {number}",
                row if source.field is None else {source.field: row[source.field]},
            )
    except (OSError, ValueError, RuntimeError, KeyError, hub.exceptions.DatasetsError) as error:
        raise InputError(f"cannot load the data set {dataset!r}: {_first_line(error)}", BUNDLED_INSTEAD) from error
    except transport_error() as error:  # after OSError, which the hub's own refusals are too
        raise InputError(
            f"the connection broke off while reading the data set {dataset!r}: {_first_line(error)}",
            f"run the same command again; {BUNDLED_INSTEAD}",
        ) from error


def _suggestion(dataset: str) -> str:
    names = ["bundled", *PRESETS]
    close = difflib.get_close_matches(dataset.lower(), names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}--dataset takes {', '.join(names)}, a hub name org/name, or a .txt, .jsonl or .parquet file"


def _hub_source(hub: ModuleType, dataset: str) -> HubSource:
    """The source that 'org/name[:config[:split]]' names; asks the hub for the splits when none is given."""
    path, _, rest = dataset.partition(":")
    config, _, split = rest.partition(":")
    if split:
        return HubSource(path, config or None, Rows(split), Rows(split))
    splits = hub.get_dataset_split_names(path, config or None)
    calibration = "train" if "train" in splits else splits[0]
    evaluation = next((name for name in ("test", "validation") if name in splits), calibration)
    return HubSource(path, config or None, Rows(calibration), Rows(evaluation))


def offline(dataset: str, instead: str) -> bool:
    """Whether the user has asked for cached data only; if not, InputError when the hub cannot be reached.

    dataset: what the hub is needed for. instead: what works without, for the hint. Asking before `datasets` is
    imported keeps the answer under ten seconds; the library itself retries for half a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if not _reachable(constants.ENDPOINT):
        raise InputError(
            f"{dataset!r} is not a local file, and the hub at {constants.ENDPOINT} cannot be reached",
            f"{instead}; HF_HUB_OFFLINE=1 uses what was downloaded before",
        )
    return False


def _reachable(url: str) -> bool:
    """Whether anything answers at `url` within PROBE_SECONDS, through the proxies that are set."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except urllib.error.URLError as error:
            # Certificates are the library's business: it may know authorities that this probe does not.
            answers.append(isinstance(error.reason, ssl.SSLError))
        except OSError:
            answers.append(False)

    # A name lookup knows no time limit, so it is waited for in a thread that may be left behind.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 1)
    return answers == [True]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
