import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipeline.core.errors import UserError
from studies import study as module
from studies.study import Point, holm, load_study, markdown, plot
from studies.tasks import ROOT

SMALL = """
fixed: {seeds: [0, 1]}
grids:
  - title: labels
    x: distillation.label_fraction
    vary: {distillation.label_fraction: [0.1, 1.0], student: [{width: 4, hidden: 16}, {width: 8}]}
  - {title: temperature, x: kd.temperature, fixed: {student: {width: 4, hidden: 16}}, vary: {kd.temperature: [2.0, 5]}}
"""
RESULT = {"accuracy_teacher": 0.98, "accuracy_student_alone": 0.96, "accuracy_student_distilled": 0.97}
RESULT |= {"metric": "accuracy", "gain": 0.01, "low": 0.004, "high": 0.016, "p": 0.02, "detectable": 0.005, "verdict": "better"}


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> list[Point]:
    (folder / "studies").mkdir()
    (folder / "studies" / "small.yaml").write_text(text)
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.setattr(module, "ROOT", folder)
    return load_study("small")


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    return load(tmp_path, monkeypatch, SMALL)


def frame_of(points: list[Point]) -> pd.DataFrame:
    rows = {point.name: point.settings | RESULT for point in points}
    return pd.DataFrame(list(rows.values()), list(rows))


@pytest.mark.parametrize("name", ["mnist", "pneumoniamnist"])
def test_the_studies_here_have_valid_points(name: str):
    points = load_study(name, threads=3)
    assert len({point.name for point in points}) == 25
    assert {point.params.threads for point in points} == {3}


def test_points_are_all_combinations_with_blocks_spelt_out(points: list[Point]):
    assert len(points) == 4 + 2
    assert points[2].name == points[5].name  # in both grids
    chosen = {"distillation.label_fraction": 0.1, "student.width": 8, "student.hidden": 64, "kd.temperature": 5.0}
    assert points[1].settings == {"seeds": [0, 1]} | chosen
    assert points[1].params.flat(*chosen) == chosen


def test_the_table_has_a_row_per_finished_point(points: list[Point]):
    text = markdown("small", frame_of(points[:4]), list(points[0].settings), 5)
    assert text.startswith("Study small: 4 of 5 points finished, on commit `")
    assert "`; seeds [0, 1], kd.temperature 5.0.\n" in text
    assert "better 4, worse 0, equivalent 0, undecided 0. Corrected for there being 4 comparisons (Holm 1979), 0 of" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    columns = [
        "teacher (%)",
        "alone (%)",
        "distilled (%)",
        "gain (points of accuracy)",
        "95 % interval",
        "p, Holm",
        "distilled is",
    ]
    assert rows[0] == ["distillation.label_fraction", "student.width", "student.hidden", *columns]
    assert rows[2] == ["0.1", "4", "16", "98.00", "96.00", "97.00", "+1.00", "+0.40 to +1.60", "0.080", "better"]
    assert len(rows) == 2 + 4


def test_holms_correction():
    corrected = holm(pd.Series({"a": 0.03, "b": 0.01, "c": 0.2, "d": 0.02}))
    assert corrected.to_dict() == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.2, "d": 0.06})


def test_the_figure_has_a_panel_per_grid_and_a_line_per_setting(points: list[Point]):
    panels = plot(frame_of(points[:4]), points).axes
    assert [panel.get_title() for panel in panels] == ["labels", "temperature"]
    assert [len(panel.containers) for panel in panels] == [2, 1]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["width 4, hidden 16", "width 8, hidden 64"]
    assert not plot(frame_of(points[:1]), points).axes[1].containers  # nothing of that grid has finished


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("grids: [{title: t, x: kd.alpha, vary: {kd.temperature: [1.0]}}]", "x = 'kd.alpha' is not varied"),
        ("grids: [{title: t, x: kd.alpha, vary: {kd.alpha: [2.0]}}]", "kd.alpha = 2.0"),
        ("grids: [{title: t, x: kd.alfa, vary: {kd.alfa: [0.5]}}]", "kd.alfa"),
        ("grids: [{title: t, x: seeds.x, vary: {seeds.x: [0.5]}}]", "seeds = {'x': 0.5}"),
        ("grids: [{title: t, x: kd.divergence, vary: {kd.divergence: [forward, reverse]}}]", "they make no axis"),
        ("grids: [{title: t, x: seeds., vary: {seeds.: [[0]]}}]", "seeds = {'': "),
        ("grids: [{title: t, x: kd.alpha, vary: {kd.alpha: []}}]", "grids.0.vary.kd.alpha"),
        (f"grids: [{{title: t, x: a, vary: {{a: {[1] * 101}, b: {[1] * 100}}}}}]", "10,100 points"),
        ("target: x", "grids"),
        ("[", "small.yaml"),
    ],
)
def test_a_bad_study_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, named: str):
    with pytest.raises(UserError, match=named):
        load(tmp_path, monkeypatch, text)


@pytest.mark.parametrize(
    ("name", "hidden", "message"),
    [
        ("nothing", "", "mnist, original, pneumoniamnist, retinamnist"),
        pytest.param("mnist", "ray", "pip install -r requirements-ray.lock, or run <name> --one-by-one", marks=pytest.mark.slow),
        pytest.param("mnist", "", "RAY_ADDRESS=127.0.0.1:9: [Errno 111] Connection refused", marks=pytest.mark.slow),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, name: str, hidden: str, message: str):
    script = f"import sys; sys.modules['{hidden}'] = None; sys.argv = ['', 'run', '{name}']; import studies.study as s; s.main()"
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", done.stderr)
