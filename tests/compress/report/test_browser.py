"""report.html as a browser shows it: laid out at the width of a phone and of a desk, light and dark."""

import html as escaping
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation
from pages import HOSTILE, quantized

from llmpare.compress.report import html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
LOOK = Path(__file__).with_name("look.js")
PLACES = [(theme, width) for theme in ("light", "dark") for width in (375, 1100)]

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: none of {', '.join(BROWSERS)}")


def hostile() -> dict[str, Any]:
    """Names and texts that are too long, or that would act on a page."""
    report = evaluation((HOSTILE + "/very" * 60, "<script>document.title = 'acted'</script>"))
    report["warnings"] = ["x" * 300]
    for candidate in report["candidates"]:
        candidate["worst"][0]["context"] = "<style>body{background:red}</style>" + "y" * 400
    return report


PAGES = {
    "quantize": lambda: html.render(quantized()),
    "deep": lambda: html.render(quantized(96)),
    "evaluate": lambda: html.render(evaluation()),
    "hostile": lambda: html.render(hostile()),
    "broken": lambda: "<title>x</title><p style='width:2000px;color:#999;background:#aaa'>pale</p>",
}

Facts = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    """What the browser finds on every page, for every theme and width; it is started once."""
    folder = tmp_path_factory.mktemp("browser")
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px;color-scheme:{theme}" srcdoc="{text}"></iframe>'
        for text in (escaping.escape(page()) for page in PAGES.values())
        for theme, width in PLACES
    )
    script = LOOK.read_text(encoding="utf-8")
    harness = folder / "harness.html"
    harness.write_text(
        f'<!doctype html><body>{frames}<pre id="found"></pre><script>{script}</script>', encoding="utf-8"
    )
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", harness.as_uri()],
        capture_output=True, encoding="utf-8", timeout=120, check=True,
    )  # fmt: skip
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert text is not None, done.stderr[-2000:]
    facts = iter(json.loads(escaping.unescape(text[1])))
    return {name: {place: next(facts) for place in PLACES} for name in PAGES}


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", ["quantize", "deep", "evaluate", "hostile"])
def test_the_page_reads_well(name: str, place: tuple[str, int], seen: dict[str, Facts]) -> None:
    facts, (theme, width) = seen[name][place], place
    assert facts["width"] == width
    assert facts["scroll"] <= width, "the page itself scrolls sideways"
    assert facts["outside"] == [], "sticks out of the page"
    assert facts["faint"] == [], "contrast below 4.5"
    assert facts["cut"] == [], "sticks out of its drawing"
    assert facts["small"] == [], "below 8 pixels"
    assert facts["drawings"] >= 3
    assert facts["title"] != "acted"
    assert min(facts["background"]) > 200 if theme == "light" else max(facts["background"]) < 60


def test_a_page_that_does_not_read_well_is_found_out(seen: dict[str, Facts]) -> None:
    for (_, width), facts in seen["broken"].items():
        assert facts["scroll"] > width
        assert facts["outside"]
        assert facts["faint"]
