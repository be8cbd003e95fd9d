import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.reporting.report import Results, plot_size, sentence, to_html, write_report
from pipeline.evaluation.statistics import compare
from tests.conftest import ROOT

METRICS = ROOT / "metrics"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def figures(accuracy: float, **more: float) -> dict[str, float]:
    values = {"accuracy": accuracy, "auc": 0.99, "f1_weighted": accuracy, "nll": 0.05, "ece": 0.01} | more
    spread = {f"{key}_{kind}": 0.001 for key in values for kind in ("sd", "ci95")}
    return values | spread | {"parameters": 1000}


@pytest.fixture
def results() -> Results:
    random = np.random.default_rng(0)
    hits = {
        model: random.random((3, 2000)) < chance
        for model, chance in {"teacher": 0.97, "student_distilled": 0.93, "student_alone": 0.85}.items()
    }
    pairs = (("student_distilled", "student_alone"), ("teacher", "student_distilled"), ("teacher", "student_alone"))
    by_class = {
        "cat": {"precision": 0.9, "recall": 0.8, "f1": 0.85},
        "dog": {"precision": 0.7, "recall": 0.7, "f1": 0.7},
    }
    cost = {"file_bytes": 4000, "latency_ms": 0.1, "latency_p95_ms": 0.2, "images_per_second": 1e5}
    model = {"architecture": "compact_cnn", "arguments": {}, "parameters": {"a": 1}, "seeds": [0], "best_epochs": [1]}
    model |= {"at_chance": []}
    dataset = {
        "name": "pets",
        "images": {"train": 1, "val": 2, "test": 2000},
        "image_shape": [8, 8, 1],
        "validation": "official",
        "fingerprint": "abc",
    }
    return Results(
        metrics={name: figures(float(hit.mean())) for name, hit in hits.items()},
        comparisons={f"{a}_vs_{b}": compare(hits[a], hits[b]).as_json() for a, b in pairs},
        by_class=dict.fromkeys(hits, by_class),
        run={"dataset": dataset, "models": dict.fromkeys(hits, model)},
        costs={
            "models": {name: cost | {"parameters": 1000} for name in hits} | {"student": cost, "student_int8": cost},
            "machine": {"processor": "p", "cores": 2, "threads": 2, "python": "3", "torch": "2"},
            "commit": "c0ffee",
            "code_is_committed": True,
        },
        exported={
            "pytorch": {"accuracy": 0.93},
            "student": {"accuracy": 0.93, "largest_difference": 1e-6, "same_predictions": 1.0},
            "student_int8": {"accuracy": 0.929, "largest_difference": 0.01, "same_predictions": 0.999},
        },
    )


def test_the_report_answers_in_the_order_of_the_questions(results: Results):
    text = write_report("distillation", results, "size.png")
    headings = [
        "# Is the distilled",
        "**better**",
        "How much",
        "which classes",
        "what cost",
        "How sure",
        "How it was run",
    ]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "Hardest for student_distilled, by F1: dog, cat" in text
    assert "c0ffee" in text
    assert "abc" in text


def test_a_model_that_learned_nothing_is_warned_of_before_anything_else_is_said(results: Results):
    assert "Warning" not in write_report("distillation", results, "size.png")
    failed = results.run["models"]["teacher"] | {"at_chance": [0, 2]}
    text = write_report(
        "distillation",
        results._replace(run=results.run | {"models": results.run["models"] | {"teacher": failed}}),
        "size.png",
    )
    assert "teacher, seed 0, 2: no better" in text.split("## ")[0].split("**better**")[0]


def test_names_from_the_data_are_text(results: Results):
    name = "<img src=x onerror=alert(1)> | cat\n# heading"
    by_class = {model: classes | {name: classes["cat"]} for model, classes in results.by_class.items()}
    text = write_report("distillation", results._replace(by_class=by_class), "size.png")
    assert "<img src=x" not in text
    assert "\n# heading" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| &lt;img")]
    assert row.count("|") == 9


def test_verdicts_are_said_in_words(results: Results):
    one = results.comparisons["student_distilled_vs_student_alone"]
    assert "is **better** than" in sentence("a_vs_b", one)
    worse = one | {"verdict": "worse"}
    assert "**a** is **worse** than **b**" in sentence("a_vs_b", worse)
    unclear = one | {"verdict": "not distinguishable", "detectable": 0.005}
    assert "not distinguishable at 95 %" in sentence("a_vs_b", unclear)
    assert "difference of 0.50 points" in sentence("a_vs_b", unclear)
    assert "single seed" in sentence("a_vs_b", unclear | {"seeds": 1})
    assert "too few" in sentence("a_vs_b", unclear | {"detectable": 1.4})


class _Addresses(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]


@pytest.fixture
def page(results: Results, tmp_path: Path) -> Path:
    folder = tmp_path / "metrics"
    text = write_report("distillation", results, "size.png")
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (plot_size(results) if name == "size.png" else Figure()).savefig(folder / name)
    (folder / "report.html").write_text(to_html(text, folder, "Is it?"))
    return folder / "report.html"


def test_the_page_asks_nobody_for_anything(page: Path):
    seen = _Addresses(page.read_text())
    assert len(seen.found) == 8
    assert all(address.startswith("data:") for address in seen.found)
    assert "script" not in seen.tags
    assert "url(" not in page.read_text()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_opens_in_a_browser_without_a_request_or_an_error(page: Path, tmp_path: Path):
    """The page's own policy forbids every request, so that one would be an error on the console."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "How it was run" in done.stdout
    assert "CONSOLE" not in done.stderr
    page.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    spoilt = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Content Security Policy" in spoilt.stderr, "or the test could not fail"


def committed(name: str) -> dict:
    return json.loads((METRICS / name).read_text())


def test_the_committed_report_is_made_of_the_committed_figures():
    results = Results(
        *(committed(f"distillation{end}.json") for end in ("", "_comparisons", "_by_class", "_run", "_costs")),
        committed("export.json"),
    )
    assert write_report("distillation", results, "report_size.png") == (METRICS / "report.md").read_text()
    assert results.run["dataset"]["images"]["test"] == 10_000
    assert len(results.run["models"]["teacher"]["seeds"]) >= 5
