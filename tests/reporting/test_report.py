import html
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import pipeline.report
from pipeline.core.files import write_json
from pipeline.data.prepared import TrainingData
from pipeline.evaluation.comparisons import Evaluation, write_evaluation
from pipeline.reporting.report import data_uri, render, sentence
from tests.browser import CHROMIUM, FLAGS, needs_browser, open_browser
from tests.conftest import ROOT, digits
from tests.evaluation.samples import PLAN, evaluate, even_odd, with_validation
from tests.reporting.conftest import COSTS, EXPORTED, changed

HOSTILE = "<img src=/etc/passwd onerror=alert(1)> | ![cat](/etc/passwd) # {{ 7 * 7 }} $x^2$ <script>"
SCREEN = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
FIGURES = ["summary", "reliability", "loss_curves", "confusion", "curves"]
ADDRESSES = {"markdown": "figures/summary.png", "html": data_uri(b"png")}


def rendered(format: str, evaluation: Evaluation, exported: dict = EXPORTED) -> str:
    figures = {f"{name}.png": ADDRESSES[format] for name in FIGURES}
    return render(format, PLAN.question, evaluation, COSTS, exported, figures)


def addresses(page: str) -> list[str]:
    """What the page's elements refer to."""
    elements = " ".join(re.findall("<[^>]*>", page))
    assert not re.search(r"<script|\son\w+=", elements)
    assert "url(" not in page
    return re.findall(r'(?:src|href|srcset|action|data)="(.*?)"', elements)


@pytest.mark.parametrize("format", ADDRESSES)
def test_the_report_answers_in_the_order_of_the_questions_and_names_limits_once(format: str, evaluation: Evaluation):
    text = rendered(format, evaluation)
    parts = [PLAN.question, "digits, 400 test images, seeds 0, 3.", "student_alone, seed 3: not shown to be more accurate"]
    parts += ["points of accuracy", "How much", "On which classes", "Hardest for student_distilled, by F1: ", "At what cost"]
    limits = ["is 8x8 pixels", "count as independent", "same patient", "images from elsewhere"]
    parts += ["student_int8.onnx: probabilities within 0.01", "How sure", "Limits", *limits]
    parts += ["How it was run", "0" * 64, "c0ffee"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert [text.count(words) for words in limits] == [1] * 4
    learned = evaluation.detail | {"models": dict.fromkeys(PLAN.models, evaluation.detail["models"]["teacher"])}
    other = rendered(
        format, evaluation._replace(detail=learned), {key: EXPORTED[key] for key in EXPORTED if key != "student_int8"}
    )
    assert ("not shown to be more accurate" in other, "int8: not kept" in other) == (False, True)


NONE_DIFFERED = {"verdict": "undecided", "gain": 0.0, "low": 0.0, "high": 0.0, "margin": 0.3, "detectable": 0.0}
SAID = [  # changes, and what the report says because of them
    (
        {"comparison": {"verdict": "better", "low": 0.1, "high": 0.2, "margin": 0.3}},
        "student_distilled is non-inferior to teacher by the margin of 30.00 points of accuracy; student_alone is",
    ),
    ({"comparison": NONE_DIFFERED}, "student_distilled was not shown to be non-inferior to teacher by the margin of 30.00"),
    ({"comparison": {"patients": 30}}, "No class has 10 test patients: whether"),
    (
        {"data": {"shared_images": {"train/test": 8}, "images": {"train": 400, "val": 100, "test": 0, "unlabelled": 1234}}},
        "8 in train/test. Results on them may flatter",
        "1,234 unlabelled",
        "from the same weights; the distilled one also sees the images without a label",
    ),
    (
        {"parameters": {"distillation.selection": "last", "distill.ensemble": True, "distillation.alone_epochs": 88}},
        "the weights of the last epoch",
        "the intervals hold for these teachers",
        "the same weights, and the lone one is trained for 88 epochs of its own",
    ),
    (
        {"parameters": {"distill.method": "rkd", "distill.answers": "permuted"}},
        "The method is rkd. **A control:** the distilled student did not learn from the teacher's own answers",
    ),
    (
        {"parameters": {"distillation.label_fraction": 0.01}, "train_images": dict.fromkeys("012345678", 200) | {"9": 3}},
        "; known are the labels of 19 of 1,803 training images, at least one of each class.",
    ),
    (
        {"parameters": {"teacher.features": None, "student.pretrained": False}},
        "A pretrained small network was not run (`student.pretrained`). A linear probe was not run",
    ),
]


@pytest.mark.parametrize(("changes", "said"), [(changes, said) for changes, *said in SAID])
def test_the_report_says_what_is_particular(changes: dict, said: list[str], evaluation: Evaluation):
    usual = rendered("markdown", changed(evaluation))
    assert "this data cannot tell whether distilling it helps" in usual
    assert "No class has 10 test images: whether student_distilled loses one was not tested." in usual
    assert "student_alone was not shown to be non-inferior to teacher by the margin of 0.00 points of accuracy" in usual
    text = rendered("markdown", changed(evaluation, **changes))
    assert [(words in usual, words in text) for words in said] == [(False, True)] * len(said)
    assert ("cannot tell" in text) == (changes.get("comparison", {}).get("verdict") != "better")


def test_classes_without_images_are_named(evaluation: Evaluation):
    text = rendered("markdown", evaluation._replace(labels=evaluation.labels % 8, val_labels=evaluation.val_labels % 8))
    assert "**Warning:** no test image is of class 8, 9: no figure here says anything of recognizing it." in text
    assert "no validation image is of class 8, 9: epochs, thresholds and temperatures were chosen without it." in text


def table(text: str, first: str) -> dict[str, dict[str, str]]:
    """The rows of a report's table by their first cell; `first` and another are its first headings."""
    lines = text[re.search(rf"\| {first} ", text).start() :].split("\n\n")[0].splitlines()
    headings, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows}


def test_no_difference_is_detectable_where_none_was_seen(evaluation: Evaluation):
    text = rendered("markdown", changed(evaluation, NONE_DIFFERED))
    assert table(text, "comparison")["teacher - student_alone"]["detectable"] == ""


def test_every_route_to_a_cheap_model_is_in_one_table(evaluation: Evaluation):
    text = rendered("markdown", evaluation)
    rows = table(text.partition("## At what cost")[2], "model")
    assert list(rows) == [*PLAN.models, "student.onnx", "student_int8.onnx", "teacher.onnx", "teacher_int8.onnx"]
    for row in rows.values():
        assert {"accuracy (%)", "AUC", "file (bytes)", "multiply-adds", "with its teacher's (s)"} <= row.keys()
        assert "" not in row.values(), "a dash where something is not known"
    assert [rows["teacher_int8.onnx"][key] for key in ("accuracy (%)", "AUC", "file (bytes)")] == ["92.90", "0.9870", "4,000"]
    assert "teacher_int8.onnx: probabilities within 0.01 of those of teacher.onnx, the same class for 99.90 %" in text
    assert "not run" not in text, "of options that the parameters do not have"


def test_a_linear_probe_a_pretrained_student_and_a_missing_teacher_are_said_in_the_table_of_routes(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    other = changed(evaluation, parameters={"teacher.features": "f.npz", "student.pretrained": True})
    other.detail["models"]["teacher"]["architecture"] = "outside: linear probe"
    exported = {key: EXPORTED[key] for key in ("pytorch", "student", "student_int8")} | {"no_teacher": "a reason <b>"}
    monkeypatch.setitem(COSTS, "models", {model: cost for model, cost in COSTS["models"].items() if "teacher" not in model})
    text = rendered("markdown", other, exported)
    rows = table(text.partition("## At what cost")[2], "model")
    students = "student_distilled", "student_alone (the pretrained small network)"
    assert list(rows) == ["teacher (linear probe)", *students, "student.onnx", "student_int8.onnx"]
    assert rows["teacher (linear probe)"]["latency, 1 image (ms)"] == rows["teacher (linear probe)"]["multiply-adds"] == "–"
    assert "There is no int8 version of teacher: a reason &#60;b&#62;." in text
    assert "The linear probe's row is without the network that made its features" in text
    assert "teacher_int8" not in text


def test_gains_in_recall_and_the_classes_that_are_lost_rarest_first(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch):
    recalls = {other: {name: dict(row) for name, row in rows.items()} for other, rows in evaluation.detail["recalls"].items()}
    rows = recalls["teacher"]
    rarest, second, third, fourth, *_ = rows
    recalls["student_alone"][rarest] |= {"low": -0.2, "high": 0.0}
    rows[rarest] |= {"gain": -0.15, "low": -0.2, "high": -0.1}
    rows[second] |= {"gain": 0.0, "low": -0.1, "high": 0.1}
    rows[third] |= {"gain": 0.0, "low": 0.0, "high": 0.0}
    rows[fourth] |= {"gain": -1.0, "low": -1.0, "high": -1.0}
    text = rendered("markdown", changed(evaluation, recalls=recalls))
    assert f"loses** against student_alone: none was shown; against teacher: {rarest}, {fourth}. A class is lost if" in text
    assert text.index("A class is lost") < text.index("## How much")
    cells = [row["recall over teacher (points)"] for row in table(text, "class").values()]
    assert cells[:2] == ["-15.00 (-20.00 to -10.00)", "+0.00 (-10.00 to +10.00)"]
    assert cells[2:4] == ["+0.00 (no difference in any seed)", "-100.00 (all images and seeds alike)"]
    assert "Tested were the classes with at least 10 test images, 1 of 10." in text
    monkeypatch.setattr(pipeline.reporting.report, "MOST_LOST", 1)
    assert f"teacher: {rarest} and 1 more." in rendered("markdown", changed(evaluation, recalls=recalls))


def test_two_classes_have_operating_points_that_show_a_shifted_test_split(tmp_path: Path, data: TrainingData):
    evaluation = evaluate(tmp_path / "models", even_odd(data))
    for row in (0, 1):
        figures = evaluation.detail["models"]["teacher"]["validation_figures"][row]
        figures |= {"specificity_youden": 0.5 + evaluation.metrics["teacher"]["specificity_youden"]}
    text = rendered("markdown", evaluation)
    val, test = (np.bincount(labels).tolist() for labels in (evaluation.val_labels, evaluation.labels))
    assert f"images ({val[1]} of odd, {val[0]} of even); after it, or alone: on the test images ({test[1]} and {test[0]})" in text
    assert "Validation and test differ most in specificity at Youden's threshold, teacher: " in text
    assert re.search(r"\| teacher +\| \d+\.\d\d ± \d+\.\d\d → \d", text)
    text = rendered("markdown", evaluate(tmp_path / "without", with_validation(even_odd(data), 0)))
    assert "no validation images of both classes to choose a threshold on" in text
    assert re.search(r"\| teacher +\| \d+\.\d\d ± \d+\.\d\d +\| [^→]*\|\n", text)


def test_calibration_before_and_after_scaling_and_what_cannot_be_judged_without_validation_images(
    tmp_path: Path, evaluation: Evaluation, data: TrainingData
):
    exported = EXPORTED | {"student": EXPORTED["student"] | {"temperature": 1.25}}
    text, figures = rendered("markdown", evaluation, exported), evaluation.metrics["teacher"]
    cells = [f"{figures[key]:.4f} ± {figures[f'{key}_sd']:.4f}" for key in ("nll", "nll_calibrated")]
    assert re.search(rf"\| teacher +\| {figures['temperature']:.3f} ± \S+ +\| {cells[0]} +\| {cells[1]} ", text)
    assert "its logits divided by the temperature 1.250, fitted on the validation images; in PyTorch that" in text
    text = rendered("html", evaluate(tmp_path / "models", with_validation(data, 0)))
    assert "There are no validation images: whether a training learned anything was not judged." in text
    assert "No temperature was fitted" in text


def test_what_the_student_loses_is_listed_or_there_is_none(evaluation: Evaluation):
    right = np.tile(np.eye(10, dtype=np.float32)[evaluation.labels], (2, 1, 1))
    wrong = right.copy()
    wrong[:, :13] = np.roll(wrong[:, :13], 1, axis=2)
    texts = [
        rendered("markdown", evaluation._replace(probabilities={"teacher": right, "student_distilled": student}))
        for student in (wrong, right)
    ]
    assert "get wrong: 13; here those of the highest confidence. An image" in texts[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in texts[0].splitlines()]
    assert [f"{number}" for number in range(12)] == [row[0] for row in rows if row[3:] == ["1.00", "1.00"]]
    assert "most seeds of student_distilled get wrong: none." in texts[1]


def test_names_from_the_data_are_text(tmp_path: Path, data: TrainingData):
    dataset = data.dataset.model_copy(update={"name": HOSTILE, "classes": [HOSTILE, *data.dataset.classes[1:]]})
    evaluation = evaluate(tmp_path / "models", data._replace(dataset=dataset))
    text, page = rendered("markdown", evaluation), rendered("html", evaluation)
    assert "<" not in text
    assert re.findall(r"\]\((.*?)\)", text) == [ADDRESSES["markdown"]] * len(FIGURES)
    assert set(addresses(page)) == {ADDRESSES["html"], "data:,"}
    assert HOSTILE in html.unescape(re.sub("<[^>]*>", "", page))


UNDECIDED = {"verdict": "undecided"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "**a** is **better** than **b**: +1.00 points of accuracy (95 % interval +0.50 to +1.50) over 3 seeds and 2,000"),
        ({"verdict": "worse"}, "**a** is **worse** than **b**: +1.00 points"),
        ({"verdict": "equivalent"}, "**a** and **b** are **equivalent within ± 0.20 points of accuracy**: +1.00 points"),
        (UNDECIDED, "Whether **a** is better than **b** is **undecided**: +1.00 points"),
        (UNDECIDED, "; as many of both would show a difference of 0.50 in 80 % of such studies."),
        (
            UNDECIDED | {"low": 0, "high": 0, "images": 40},
            "; no image makes any difference, yet so few may hide one of up to 7.50.",
        ),
        ({"verdict": "better, by less than the margin"}, "**, but equivalent within ± 0.20 points of accuracy:"),
        ({"metric": "nll"}, "+0.0100 nats of negative log-likelihood (95 % interval +0.0050 to"),
        (
            {"seeds": 2},
            "**a** against **b**: +1.00 points of accuracy over 2 seeds and 2,000 test images: a smoke test, no evidence.",
        ),
    ],
)
def test_verdicts_in_words(changes: dict, words: str):
    comparison = {"metric": "accuracy", "margin": 0.002, "verdict": "better", "gain": 0.01, "low": 0.005, "high": 0.015}
    comparison |= {"detectable": 0.005, "seeds": 3, "images": 2000}
    assert words in sentence("a_vs_b", comparison | changes)


@pytest.fixture
def page(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_evaluation(evaluation, tmp_path)
    for name, content in (("distillation_costs", COSTS), ("distillation_export", EXPORTED)):
        write_json(tmp_path / f"metrics/{name}.json", content)
    (tmp_path / "data/distillation/test").mkdir(parents=True)
    np.save(tmp_path / "data/distillation/test/images.npy", digits(400)[0][..., None])
    pipeline.report.main("distillation")
    return tmp_path / "metrics/report.html"


def test_the_stage_writes_table_report_and_figures(page: Path):
    files = re.findall(r"!\[.*?\]\((.*?)\)", page.with_suffix(".md").read_text())
    assert [(page.parent / file).is_file() for file in files] == [True] * len(FIGURES)
    assert (page.parent / "gallery/distillation.png").is_file()
    assert page.with_name("distillation.md").read_text().startswith("distillation: digits, ")
    assert [address[:5] for address in addresses(page.read_text())] == ["data:"] * (1 + len(FIGURES))


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_opens_in_a_browser_without_a_request_or_an_error(page: Path, tmp_path: Path):
    """The page's own policy forbids every request, so that one would be an error on the console."""
    command = [CHROMIUM, *(f"--{flag}" for flag in FLAGS), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    for element, refused in (("", False), ('<img src="http://127.0.0.1:9/x.png">', True)):  # or the test could not fail
        page.write_text(page.read_text().replace("</body>", f"{element}</body>"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert ("How it was run" in done.stdout, "CONSOLE" in done.stderr) == (True, refused), done.stderr


@needs_browser
def test_on_a_narrow_screen_tables_scroll_and_the_page_does_not(page: Path, tmp_path: Path):
    with open_browser(tmp_path / "profile") as browser:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SCREEN)
        browser.get(page.as_uri())
        sideways = "const wider = (element) => element.scrollWidth > element.clientWidth; return "
        sideways += "[wider(document.documentElement), [...document.querySelectorAll('table')].some(wider), innerWidth]"
        assert browser.execute_script(sideways) == [False, True, 400]


def test_the_committed_report_is_made_of_the_committed_figures():
    text = (ROOT / "metrics/report.md").read_text()
    metrics = json.loads((ROOT / "metrics/distillation.json").read_text())
    gain, low, high = (f"{100 * metrics.pop(key):+.2f}" for key in ("gain", "gain_low", "gain_high"))
    assert f"{gain} points of accuracy (95 % interval {low} to {high}) over 5 seeds and 10,000 test images" in text
    for model, figures in metrics.items():
        assert re.search(rf"\| {model} +\| {100 * figures['accuracy']:.2f} ± ", text), model
