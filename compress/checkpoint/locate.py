"""From what the user typed to a model folder: a local folder first, else a model of the Hugging Face hub."""

import os
import re
from pathlib import Path
from threading import Thread

from llmpare.compress.checkpoint.files import shown
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.hub import transport_error

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
ARCHIVE = re.compile(r".*\.(zip|tar|tgz|tbz2|txz|7z|rar|gz|bz2|xz|zst)", re.IGNORECASE | re.DOTALL)
REQUEST_SECONDS = 4.0  # for the hub to answer, and
PATIENCE_SECONDS = 7.0  # for all of it, the name server included

# Weights in one format, and what describes them. Code (*.py) is fetched, to be carried over, but not run.
WANTED = [
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.py",
    "LICENSE*", "NOTICE*", "README.md",
]  # fmt: skip
# The same weights a second time, in the layout of the original authors.
UNWANTED = ["consolidated*.safetensors", "*/*.safetensors"]


def resolve(model: str, *, revision: str | None = None) -> Path:
    """The folder of `model`: a path, or 'organisation/name' on the hub (then at `revision`, if given).

    A model of the hub is fetched, or taken from the hub's cache when the hub cannot be reached. Raises UsageError
    for a path that is not a folder and a name the hub does not know, InputError when the hub cannot be reached and
    nothing is cached; the latter within ten seconds.
    """
    if os.path.isdir(model):
        if revision is not None:
            raise UsageError(f"{shown(model)} is a local folder and has no revision {shown(revision)}")
        return Path(model)
    if ARCHIVE.fullmatch(model):
        raise UsageError(f"{shown(model)}: archives are not unpacked", "unpack it and name the folder")
    if os.path.lexists(model):
        raise UsageError(f"{shown(model)} is not a folder: expected a folder with config.json")
    if not HUB_NAME.fullmatch(model):
        raise UsageError(
            f"{shown(model)} does not exist: expected a folder with config.json",
            "models of the Hugging Face hub are named organisation/name",
        )
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = shown(model)
    at = "" if revision is None else f" at revision {shown(revision)}"
    online = _answers(model, revision)
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=not online,
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is gated on the hub and you have no access",
            "ask for it on its page, then run `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{name} is neither a folder nor a model on the hub that you have access to",
            "check the name; for a private model run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {shown(revision)} on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name}{at} is not a local folder, the hub cannot be reached, and its cache has no complete copy",
            "name a local folder (examples/tiny-llama comes with the source), or fetch it where there is a network: "
            f"hf download {model}",
        ) from error
    except (transport_error(), OSError) as error:
        raise InputError(
            f"{name}{at} cannot be fetched from the hub: {shown(error)}",
            "run the same command again to go on",
        ) from error
    return Path(folder)


def _answers(model: str, revision: str | None) -> bool:
    """Whether the hub answers at all. `snapshot_download` waits for minutes where a network drops every packet."""
    from huggingface_hub import HfApi, errors

    answers = []

    def ask() -> None:
        try:
            HfApi().model_info(model, revision=revision, timeout=REQUEST_SECONDS)
        except errors.HfHubHTTPError:
            answers.append("no")  # why is found out, and reported, by snapshot_download
        except (transport_error(), OSError):  # OSError: also the offline mode of the hub's client
            return
        else:
            answers.append("yes")

    # In a thread, because the look-up of the hub's address knows no time limit.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return bool(answers)
