"""report.html as text; test_browser.py looks at it as a browser does."""

import copy
import itertools
import math
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from typing import Any

import matplotlib
import pytest
from evaluations import evaluation
from pages import HOSTILE, quantized

from llmpare.compress.report import html

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element that is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


REPORTS = {
    "quantize": quantized(),
    "evaluate": evaluation(),
    "several": evaluation(("out/a", "out/b", "out/c")),
}


@cache
def page_of(name: str) -> str:
    return html.render(REPORTS[name])


@pytest.fixture(params=REPORTS)
def rendered(request: pytest.FixtureRequest) -> str:
    return page_of(request.param)


def test_the_page_is_well_formed_and_needs_nothing_else(rendered: str) -> None:
    page = Page(rendered)
    assert page.elements[0][0] == "html"
    assert not page.all("script", "link", "img", "iframe", "object", "form")
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value is not None
                assert value.startswith("#"), value
            assert "://" not in (value or "")
    assert not re.search(r"url\((?!#)|@import|https?:", rendered)
    assert "default-src 'none'" in rendered


def test_ids_are_unique_and_every_reference_leads_somewhere(rendered: str) -> None:
    page = Page(rendered)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {str(attributes["href"])[1:] for attributes in page.all("a", "use")}
    wanted |= {str(attributes["aria-labelledby"]) for attributes in page.all("section")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", rendered))
    assert wanted <= set(ids)


def test_the_page_can_be_used_without_seeing_it(rendered: str) -> None:
    page = Page(rendered)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) - len(_tips(page)) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in attributes for attributes in page.all("th"))
    assert len(page.all("figure")) == len(page.all("figcaption"))
    assert all(attributes.get("aria-label") for attributes in page.all("figure"))


def _tips(page: Page) -> list[dict[str, str | None]]:
    """The titles inside drawings: what the pointer shows."""
    return page.all("title")[1:]


def test_colours_are_the_pages_own(rendered: str) -> None:
    """Drawings follow the theme: no colour is written into them, and every variable has a value, light and dark."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", rendered, flags=re.DOTALL))
    assert drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)
    assert "font-family" not in drawings
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", rendered))
    light, dark = (set(re.findall(r"--([a-z0-9-]+):", part)) for part in rendered.split("@media")[:2])
    assert used <= light == dark


@pytest.mark.parametrize("name", REPORTS)
def test_the_same_report_gives_the_same_bytes_whatever_the_user_has_set(name: str) -> None:
    first = page_of(name)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert html.render(copy.deepcopy(REPORTS[name])) == first
        assert matplotlib.rcParams["font.size"] == 30
    assert first.endswith("\n")


def test_nothing_is_imported_before_a_page_is_rendered() -> None:
    script = (
        "import sys, llmpare.compress.report.html as h; print(*({'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []


def test_quantize_has_its_facts() -> None:
    text = Page(page_of("quantize")).text
    for fact in (
        "examples/tiny-llama", "Passed", "2.5 times smaller", "0.21\u00a0% higher perplexity", "4.54 MB",
        "58.41 ± 0.42", "0.00286", "95.9 %", "max-kl", "damping raised to 0.1", "It was a dark night.", "8 × 512",
        "640 MB", "compressing",
        "W4A16 g128", "2.13.0", "tied to the embedding", "Error from block to block", "Bits per weight: 4 and 8",
        "mlp.down_proj", "LlamaForCausalLM",
    ):  # fmt: skip
        assert fact in text, fact
    for absent in ("Speed", "Tasks", "By domain", "Where it breaks"):
        assert absent not in text


def test_evaluate_has_its_facts() -> None:
    text = Page(page_of("evaluate")).text
    for fact in (
        "out/w4", "0.60\u00a0% higher perplexity", "How KL is spread over tokens", "KL by position",
        "Agreement by position", "KL by domain", "science", "arc_easy", "0.7120 ± 0.0093", "12 / 9", "99.58 %",
        "harbour master",
        "Decoding throughput", "Time per output token", "Time to first token", "transformers, dynamic cache, sdpa",
        "18 GB/s", "vllm", "not installed", "compressed-tensors W4A16 g128", "models/dense",
    ):  # fmt: skip
        assert fact in text, fact
    assert "Inside the model" not in text


def test_several_models_share_one_table_and_one_drawing() -> None:
    report = copy.deepcopy(REPORTS["several"])
    report["passed"] = False
    report["gates"] = [
        {"name": "out/a: max-kl", "limit": 0.007, "value": 0.003, "passed": True},
        {"name": "out/c: max-kl", "limit": 0.007, "value": 0.012, "passed": False},
    ]
    rendered = html.render(report)
    text = Page(rendered).text
    assert "3 models compared with models/dense: 2 passed, 1 did not." in text
    assert text.index("out/c: max-kl: 0.01200, the limit is 0.007") < text.index("Size against KL divergence")
    gates = text[text.index("What was demanded") :]
    assert gates.index("out/c: max-kl") < gates.index("out/a: max-kl"), "what failed comes first"
    assert "limit 0.007" in rendered
    for name in ("out/a", "out/b", "out/c", "models/dense (baseline)"):
        assert name in text


@pytest.mark.parametrize("name", REPORTS)
def test_hostile_text_stays_text(name: str) -> None:
    """Wherever a report holds a text from a model, a user or a data set, the page shows it and never acts on it."""

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {inner: poison(item, inner) for inner, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return HOSTILE + str(value) if isinstance(value, str) and key not in KEPT else value

    report = poison(copy.deepcopy(REPORTS[name]))
    rendered = html.render(report)
    page = Page(rendered)
    assert not page.all("script", "img")
    assert not any(attribute.startswith("on") for _, attributes in page.elements for attribute in attributes)
    assert "49" not in re.findall(r"\{\{ (\S+) \}\}", page.text)
    assert "{{ 7*7 }}" in page.text
    assert all(character.isprintable() or character in "\n\u00a0" for character in rendered)


KEPT = {"command", "mode", "cache", "sha256", "weights_sha256", "config_sha256", "scheme"}
"""What the page looks into rather than shows. Names of gates are poisoned too."""


def unmeasured(report: dict[str, Any]) -> None:
    for subject in report["candidates"]:
        fidelity = subject["fidelity"]
        fidelity["perplexity"] |= {"compressed": None, "increase": None, "compressed_stderr": None}
        fidelity["kl"] = dict.fromkeys(fidelity["kl"]) | {"histogram": {"edges": [0.0, 0.1, 1.0], "counts": [0, 0]}}
        fidelity["agreement"] = dict.fromkeys(fidelity["agreement"])
        fidelity["by_position"] = [each | {"kl": None, "top1": None} for each in fidelity["by_position"]]
        subject["domains"] = [each | {"kl": None, "top1": None} for each in subject["domains"]]
        subject["passed"] = False
    report["passed"] = False


def without_baseline(report: dict[str, Any]) -> None:
    report["baseline"] = None
    for subject in report["candidates"]:
        subject["size"] |= {"baseline_bytes": None, "ratio": None}
        subject["fidelity"] |= {"kl": None, "agreement": None, "by_position": []}
        subject["fidelity"]["perplexity"] |= dict.fromkeys(("dense", "increase", "dense_stderr", "increase_stderr"))
        subject["fidelity"]["bits_per_byte"]["dense"] = None
        subject["domains"] = [
            each | {"kl": None, "top1": None, "perplexity": {"dense": None, "compressed": 9.0}}
            for each in subject["domains"]
        ]
        subject["worst"] = []
        for row in subject["tasks"]["rows"]:
            row |= {"baseline": None, "recovery": None, "flips": None, "stderr": None}


def bare(report: dict[str, Any]) -> None:
    for subject in report["candidates"]:
        subject |= {"domains": [], "worst": [], "tasks": None, "speed": None}
        subject["fidelity"]["bits_per_byte"] = {"dense": None, "compressed": None}
        subject["size"]["linear_bits_per_weight"] = None


def identical(report: dict[str, Any]) -> None:
    for subject in report["candidates"]:
        fidelity = subject["fidelity"]
        fidelity["perplexity"]["increase"] = 0.0
        fidelity["kl"] |= {"mean": 0.0, "median": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0, "stderr": 0.0}
        counts = fidelity["kl"]["histogram"]["counts"]
        fidelity["kl"]["histogram"]["counts"] = [8160] + [0] * (len(counts) - 1)
        fidelity["agreement"] = {"top1": 1.0, "top5": 1.0, "stderr": 0.0}
        fidelity["by_position"] = [each | {"kl": 0.0, "top1": 1.0} for each in fidelity["by_position"]]
        subject["domains"] = [each | {"kl": 0.0, "top1": 1.0} for each in subject["domains"]]
        subject["size"] |= {"bytes": 11_540_992, "ratio": 1.0}


@pytest.mark.parametrize("names", [("out/a",), ("out/a", "out/b")])
@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        (unmeasured, "not finite", "How KL is spread"),
        (without_baseline, "perplexity of 178.4", "same next token"),
        (bare, "How KL is spread", "Tasks"),
        (identical, "KL by position", "not finite"),
    ],
)
def test_what_was_not_measured_is_left_out_or_said(names: tuple[str, ...], change: Any, said: str, unsaid: str) -> None:
    report = evaluation(names, speed=False)
    change(report)
    text = Page(html.render(report)).text
    if change is not without_baseline or len(names) == 1:
        assert said in text
    assert unsaid not in text
    assert "None" not in text


@pytest.mark.parametrize("blocks", [1, 2, 96])
def test_models_of_any_depth(blocks: int) -> None:
    page = Page(html.render(quantized(blocks)))
    assert ("Error from block to block" in page.text) == (blocks > 1)
    assert len(page.all("details")) == (blocks > 12)


def test_figures_of_a_report_that_is_not_stored_yet_may_be_nan() -> None:
    report = quantized()
    report["fidelity"]["kl"]["mean"] = report["blocks"][2]["relative_error"] = math.nan
    report["blocks"][3]["linears"][0]["relative_error"] = math.inf
    text = Page(html.render(report)).text
    assert "not finite" in text
    assert not re.search(r"\b(nan|inf)\b", text)


def pruned(**linear: Any) -> dict[str, Any]:
    """What prune's report has in common with quantize's, with other facts about every linear."""
    report = quantized()
    report["command"] = "prune"
    for name in ("scheme", "format", "rules", "method", "options"):
        del report["request"][name]
    for block in report["blocks"]:
        block["linears"] = [
            {name: each[name] for name in ("name", "rows", "columns", "relative_error")} | linear
            for each in block["linears"]
        ]
    return report


def test_a_model_with_zeros() -> None:
    report = pruned(zeros=98_304, scheme="dense", method="sparsegpt", error_removed=0.1)
    report["request"] |= {"method": "sparsegpt", "sparsity": 0.5}
    saved = ["A mask saves nothing by itself."]
    counts = {"weights": 4_718_592, "zeros": 2_359_296, "sparsity": 0.5}
    report["mask"] = {**counts, "pattern": "2:4", "allocation": "uniform", "saved": saved}
    text = Page(html.render(report)).text
    for fact in (
        "prune · sparsegpt, 50 % zeros",
        "Sparsity by linear",
        "2:4",
        "2.36 M of 4.72 M",
        saved[0],
        "50.0 % zeros",
    ):
        assert fact in text, fact
    assert "Sparsity by linear" not in Page(page_of("quantize")).text


def test_a_model_of_another_shape() -> None:
    report = pruned(kept_columns=576, units=768, kept_units=576, error_removed=0.1)
    report["blocks"][4] |= {"removed": True, "linears": [], "relative_error": None}
    report["structure"] = {
        "parameters": {"dense": 5_770_496, "kept": 4_500_000, "removed_share": 0.22},
        "flops_per_token": {"dense": 11_000_000, "kept": 9_000_000},
        "healing": {"needed": True, "command": "llmpare distill --teacher a --student b"},
    }
    text = Page(html.render(report)).text
    for fact in (
        "What each linear kept",
        "576 of 768 units",
        "5.77 M",
        "81.8 %",
        "llmpare distill --teacher",
        "removed",
    ):
        assert fact in text, fact
