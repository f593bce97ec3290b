"""What the bundled texts hold, counted from the files: `python -m llmpare.calibration_data.manifest`."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from llmpare.calibration_data import PARTS, bundled

# Bytes per token of English text under a common vocabulary of 32 to 128 thousand tokens; other scripts need
# fewer.
BYTES_PER_TOKEN = 4


def build(folder: Path) -> dict[str, Any]:
    """The manifest of the parts in `folder`: per part file, sha256, bytes, rows, and these by kind.

    Bytes of a kind are those of its texts; bytes of a part are those of its file, JSON included.
    """
    return {
        "bundled_texts": 1,
        "tokens_estimate_is": f"bytes of text / {BYTES_PER_TOKEN}, about right for text in Latin script",
        "parts": {part: _describe(folder / f"{part}.jsonl") for part in PARTS},
    }


def _describe(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    rows: Counter[str] = Counter()
    text_bytes: Counter[str] = Counter()
    for row in map(json.loads, data.splitlines()):
        texts = [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]
        rows[row["kind"]] += 1
        text_bytes[row["kind"]] += sum(len(text.encode()) for text in texts)
    return {
        "file": file.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "rows": rows.total(),
        "tokens_estimate": text_bytes.total() // BYTES_PER_TOKEN,
        "kinds": {kind: {"rows": rows[kind], "bytes": text_bytes[kind]} for kind in sorted(rows)},
    }


def main() -> None:
    """Write manifest.json beside the bundled texts."""
    folder = bundled(PARTS[0]).parent
    text = json.dumps(build(folder), indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
