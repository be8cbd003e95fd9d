"""README.md, docs/ and the model card: their figures are those of the results, their commands and links exist."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from onnxruntime import InferenceSession
from sklearn import metrics as sk

from pipeline.fetching.sources import read_source
from pipeline.params import TRACKS
from tests.conftest import ROOT, small_checkout

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
PAGES["models/student/README.md"] = CARD = (ROOT / "models/student/README.md").read_text()
PUBLISHED = {entry["name"]: entry["results"] for entry in yaml.safe_load(CARD.split("---\n")[1])["model-index"]}


def shown(page: str, pattern: str) -> str:
    """What a page shows of a file, whose name stands in a comment before it."""
    return re.search(rf"<!-- {pattern} -->\n(.*?)<!-- end -->", PAGES[page], re.DOTALL)[1].strip()


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_the_results_are_those_in_metrics():
    assert shown("README.md", "metrics/distillation.md") == (ROOT / "metrics/distillation.md").read_text().strip()
    verdict = next(line for line in (ROOT / "metrics/report.md").read_text().splitlines() if line.startswith("> "))
    assert verdict in README.splitlines()


@pytest.mark.parametrize("track", PUBLISHED)
def test_the_model_card_is_of_the_committed_files_and_results(track: str):
    """When it fails after a run of the track: make publish."""
    content, metrics = (ROOT / f"models/student/{track}.onnx").read_bytes(), ROOT / "metrics"
    costs, exported = (json.loads((metrics / f"{track}_{name}.json").read_text()) for name in ("costs", "export"))
    assert f"| {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |" in CARD
    assert costs["models"]["student.onnx"]["file_bytes"] == len(content)
    (result,) = PUBLISHED[track]
    accuracy = exported["student"]["accuracy"]
    assert result["metrics"][0] == {"type": "accuracy", "value": round(accuracy, 4)}
    assert f"On the test images this file names {100 * accuracy:.2f} % rightly" in CARD
    assert shown("models/student/README.md", f"metrics/{track}.md") == (metrics / f"{track}.md").read_text().strip()
    report = (metrics / f"{TRACKS[track].report}.md").read_text().splitlines()
    (verdict,) = (line for line in report if line.startswith("> ") and " over " in line)
    assert verdict in CARD.splitlines()


@pytest.mark.parametrize("track", PUBLISHED)
def test_the_committed_students_do_on_the_test_images_what_the_card_says(
    track: str, mirror: Path, monkeypatch: pytest.MonkeyPatch
):
    (result,) = PUBLISHED[track]
    monkeypatch.setenv("DATA_MIRROR", str(mirror))
    images, labels = read_source(result["dataset"]["config"]).splits["test"]
    session = InferenceSession(ROOT / f"models/student/{track}.onnx")
    (rows,) = session.run(None, {"images": images})
    scores = rows[:, 1] if rows.shape[1] == 2 else rows
    measured = {
        "accuracy": (rows.argmax(1) == labels).mean(),
        "roc_auc": sk.roc_auc_score(labels, scores, multi_class="ovr"),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, rows.argmax(1)),
        "log_loss": -np.log(rows[np.arange(len(labels)), labels]).mean(),
    }
    named = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert measured == pytest.approx({name: named[name] for name in measured}, abs=5e-4)


def test_the_speed_table_is_that_of_a_measured_device():
    name = re.search(r"<!-- (benchmarks/results/[\w.-]+) -->", PAGES["docs/performance.md"])[1]
    table = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("|")]
    assert shown("docs/performance.md", name).splitlines() == table


def test_the_faults_are_those_that_were_counted():
    assert f"\n{shown('docs/reliability.md', 'tests/faults/results.md')}\n" in (ROOT / "tests/faults/results.md").read_text()


@pytest.mark.parametrize(
    ("page", "study"),
    [
        ("README.md", "medical"),
        *(("docs/studies.md", study) for study in ("medical", "methods", "one_cycle", "original", "retinamnist")),
    ],
)
def test_every_difference_that_a_page_tells_of_a_study_stands_in_its_table(page: str, study: str):
    parts = {
        "README.md": ("", "This pipeline trains"),
        "docs/studies.md": (
            f"metrics/studies/{study}.md",
            {"original": ". The project's", "retinamnist": "\n\n"}.get(study, "\n\n**"),
        ),
    }
    start, end = parts[page]
    text = PAGES[page].partition(start)[2] if start else PAGES[page]
    told = set(re.findall(r"(?<![\d.])[+-]?\d\.\d\d(?![\d.])", text.partition(end)[0]))
    studies = ("medical", "methods", "retinamnist") if page == "README.md" else (study,)
    table = "".join((ROOT / f"metrics/studies/{name}.md").read_text() for name in studies)
    assert len(told) >= (8 if study in ("medical", "methods") else 3)
    assert {number for number in told if number.lstrip("+-") not in table and number != "0.75"} == set()


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "CHANGELOG.md").read_text()]
    named = {name for page in pages for words in re.findall(r"(?:`|\$ )make ([a-z -]+)", page) for name in words.split()[:1]}
    assert {"demo", "test", "ui"} <= named <= targets
    helped = set(re.findall(r"  make ([\w-]+)", (ROOT / "Makefile").read_text()))
    assert named <= helped | {"test-all"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str):
    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    for link in (link for link in links if "://" not in link):
        path, _, heading = link.partition("#")
        target = ROOT / Path(page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            lines = [line.lstrip("# ") for line in target.read_text().splitlines() if line[:1] == "#"]
            assert heading in [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines], link


def test_every_page_begins_with_a_command():
    for page, text in PAGES.items():
        assert page.endswith("README.md") or "```console\n$ " in text[:200], page


@pytest.mark.slow
def test_the_readmes_commands_do_what_it_says_from_top_to_bottom(tmp_path: Path):
    """On small data, without what installs, activates or serves (tests/tracking/test_pages.py opens `make ui`)."""
    checkout = small_checkout(tmp_path / "checkout")
    parameters = (checkout.folder / "params.yaml").read_text()
    console = "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL))
    commands = re.findall(r"^\$ (?!make demo|make test|make ui|source)(.*?)(?: +#.*)?$", console, re.MULTILINE)
    printed = {}
    for command in commands:
        compare = re.fullmatch(r"make compare(?: A=(\S+) B=(\S+))?", command)
        words = [*checkout.stage("tracking.compare"), compare[1] or "", compare[2] or ""] if compare else shlex.split(command)
        printed[command] = checkout.run(*words).stdout
    assert (checkout.folder / "params.yaml").read_text() == parameters
    assert (checkout.folder / "metrics/report.html").is_file()
    table = [line.split() for line in printed["make compare"].splitlines()]
    assert [row[0] for row in table] == ["experiment", "-" * len(table[1][0]), "HEAD", "t6", "reverse"]
    assert {"kd.temperature", "kd.divergence", "gain"} <= set(table[0])
    assert dict(zip(table[0], table[3], strict=False))["kd.temperature"] == "6"
    teacher, distilled, lone = printed["make compare A=t6 B=reverse"].splitlines()
    assert re.fullmatch(
        r"reverse against t6, student_distilled: a smoke test, no evidence, "
        r"[+-]\d+\.\d\d points of accuracy \(2 seeds, 200 images\)",
        distilled,
    )
    assert teacher == "reverse against t6, teacher: the same checkpoints"
    assert lone == "reverse against t6, student_alone: the same checkpoints"
