import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import pipeline.report
from pipeline.core.files import write_json
from pipeline.evaluation.comparisons import Evaluation, write_evaluation
from pipeline.reporting.report import data_uri, render, sentence
from tests.conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "Is the distilled student better than the same student trained alone?"
HOSTILE = "<img src=/etc/passwd onerror=alert(1)> | ![cat](/etc/passwd)\n# {{ 7 * 7 }} $x^2$ <script>"


def figures(evaluation: Evaluation, address: str) -> dict[str, str]:
    names = ["gains", "size", "reliability", "loss_curves", *(f"confusion_{model}" for model in evaluation.metrics)]
    return {f"{name}.png": address or f"figures/{name}.png" for name in names}


@pytest.fixture
def markdown(costs: dict, exported: dict) -> Callable[[Evaluation], str]:
    return lambda evaluation: render("markdown", QUESTION, evaluation, costs, exported, figures(evaluation, ""))


@pytest.fixture
def html(costs: dict, exported: dict) -> Callable[[Evaluation], str]:
    return lambda evaluation: render("html", QUESTION, evaluation, costs, exported, figures(evaluation, data_uri(b"png")))


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses, self.tags, self.texts = [], set(), []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        assert not any(key.startswith("on") for key, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_the_report_answers_in_the_order_of_the_questions(format: str, evaluation: Evaluation, request):
    text = request.getfixturevalue(format)(evaluation)
    headings = ["Is the distilled", "better", "How much", "which classes", "what cost", "How sure", "How it was run"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "Hardest for student_distilled, by F1: " in text
    assert "c0ffee" in text
    assert "abc" in text
    assert "teacher, seed" not in text


def test_a_model_that_learned_nothing_is_warned_of_before_anything_else(evaluation: Evaluation, markdown: Callable):
    assert "Warning" not in markdown(evaluation)
    models = evaluation.detail["models"]
    failed = models | {"teacher": models["teacher"] | {"at_chance": [0, 2]}}
    text = markdown(evaluation._replace(detail=evaluation.detail | {"models": failed}))
    assert "teacher, seed 0, 2: no better" in text.split("## ")[0].split("**better**")[0]


def test_names_from_the_data_are_text(evaluation_of: Callable[..., Evaluation], markdown: Callable, html: Callable):
    evaluation = evaluation_of([HOSTILE, "dog"], HOSTILE)
    text, shown = markdown(evaluation), " ".join(HOSTILE.split())
    tokens = [token for block in MarkdownIt("commonmark").enable("table").parse(text) for token in block.children or [block]]
    assert not {"html_inline", "html_block", "link_open"} & {token.type for token in tokens}
    addresses = {token.attrs["src"] for token in tokens if token.type == "image"}
    assert addresses == set(figures(evaluation, "").values())
    (row,) = [line for line in text.splitlines() if line.startswith("| &#60;img")]
    assert row.count("|") == 9
    page = Page(html(evaluation))
    assert set(page.addresses) == {data_uri(b"png"), "data:,"}
    assert "script" not in page.tags
    assert any(shown in " ".join(piece.split()) for piece in page.texts)


def test_verdicts_in_words(evaluation: Evaluation):
    better = evaluation.comparisons["student_distilled_vs_student_alone"]
    assert "**a** is **better** than **b**: +" in sentence("a_vs_b", better)
    assert "over 3 seeds and 2,000 test images." in sentence("a_vs_b", better)
    assert "**a** is **worse** than **b**" in sentence("a_vs_b", better | {"verdict": "worse"})
    unclear = better | {"verdict": "not distinguishable", "detectable": 0.005}
    assert "**a** and **b** are **not distinguishable at 95 %**: +" in sentence("a_vs_b", unclear)
    assert sentence("a_vs_b", unclear).endswith("have shown a difference of 0.50 points in 80 % of such trials.")
    assert sentence("a_vs_b", unclear | {"seeds": 1}).endswith("; a single seed does not show how much training varies.")
    assert sentence("a_vs_b", unclear | {"detectable": 1.4}).endswith(", which are too few to show any difference.")


@pytest.fixture
def page(evaluation: Evaluation, costs: dict, exported: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page that the stage writes."""
    monkeypatch.chdir(tmp_path)
    write_evaluation(evaluation, tmp_path)
    write_json(tmp_path / "metrics/distillation_costs.json", costs)
    write_json(tmp_path / "metrics/export.json", exported)
    pipeline.report.main("distillation")
    return tmp_path / "metrics/report.html"


def test_the_stage_writes_table_report_and_figures(page: Path, capsys: pytest.CaptureFixture):
    for address in [line.split("](")[1][:-1] for line in page.with_suffix(".md").read_text().splitlines() if line[:2] == "!["]:
        assert (page.parent / address).is_file()
    assert "original (mnist)" in page.with_name("distillation.md").read_text()
    seen = Page(page.read_text())
    assert len(seen.addresses) == 8
    assert all(address.startswith("data:") for address in seen.addresses)
    assert "url(" not in page.read_text()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_opens_in_a_browser_without_a_request_or_an_error(page: Path, tmp_path: Path):
    """The page's own policy forbids every request, so that one would be an error on the console."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "How it was run" in done.stdout
    assert "CONSOLE" not in done.stderr
    page.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    spoilt = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Content Security Policy" in spoilt.stderr, "or the test could not fail"


def test_the_committed_report_is_made_of_the_committed_figures():
    text = (ROOT / "metrics/report.md").read_text()
    comparisons = json.loads((ROOT / "metrics/distillation_comparisons.json").read_text())
    for name, comparison in comparisons.items():
        assert sentence(name, comparison) in text
        assert (comparison["seeds"], comparison["images"]) >= (5, 10_000)
    for model, entry in json.loads((ROOT / "metrics/distillation.json").read_text()).items():
        assert f"{100 * entry['accuracy']:.2f} ± {100 * entry['accuracy_ci95']:.2f}" in text, model
