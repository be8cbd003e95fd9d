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
from studies.study import Study, load_study, markdown, plot
from studies.tasks import ROOT

SIZES = [{"width": 4, "hidden": 16}, {"width": 8, "hidden": 32}]
FRACTIONS = {"title": "labels", "x": "distillation.label_fraction"}
FRACTIONS["vary"] = {"distillation.label_fraction": [0.1, 1.0], "student": SIZES}
WARMTH = {"title": "temperature", "x": "kd.temperature", "fixed": {"student": SIZES[0]}, "vary": {"kd.temperature": [2.0, 5.0]}}
SMALL = Study.model_validate({"fixed": {"seeds": [0, 1]}, "grids": [FRACTIONS, WARMTH]})


@pytest.mark.parametrize("name", ["mnist", "pneumoniamnist"])
def test_the_studies_here_have_valid_points(name: str):
    study, points = load_study(name, threads=3)
    assert list(points) == list(study.settings(name))
    assert len(points) == 25
    assert {params.threads for params in points.values()} == {3}


def test_points_are_all_combinations_with_blocks_spelt_out():
    points = [point for _, point in SMALL.points(SMALL.grids[0])]
    assert len(points) == 4
    assert points[0] == {"seeds": [0, 1], "distillation.label_fraction": 0.1, "student.width": 4, "student.hidden": 16}


@pytest.fixture
def frame() -> pd.DataFrame:
    result = {"accuracy_teacher": 0.98, "accuracy_student_alone": 0.96, "accuracy_student_distilled": 0.97}
    result |= {"gain": 0.01, "low": 0.004, "high": 0.016, "detectable": 0.005, "verdict": "better"}
    return pd.DataFrame({name: point | result for name, point in SMALL.settings("small").items()}).T.infer_objects()


def test_the_table_has_a_row_per_finished_point(frame: pd.DataFrame):
    varied = ["distillation.label_fraction", "student.width"]
    text = markdown("small", SMALL, frame.iloc[:4], varied, 6)
    assert "4 of 6 points finished" in text
    assert "better 4, worse 0, not distinguishable 0" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    columns = ["teacher (%)", "alone (%)", "distilled (%)", "gain (points)", "95 % interval", "distilled is"]
    assert rows[0] == [*varied, *columns]
    assert rows[2] == ["0.1", "4", "98.00", "96.00", "97.00", "+1.00", "+0.40 to +1.60", "better"]
    assert len(rows) == 2 + 4


def test_the_figure_has_a_panel_per_grid_and_a_line_per_setting(frame: pd.DataFrame):
    panels = plot("small", SMALL, frame).axes
    assert [panel.get_title() for panel in panels] == ["labels", "temperature"]
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == ["width 4, hidden 16", "width 8, hidden 32"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("grids: [{title: t, x: kd.alpha, vary: {kd.temperature: [1.0]}}]", "x = 'kd.alpha' is not varied"),
        ("grids: [{title: t, x: kd.alpha, vary: {kd.alpha: [2.0]}}]", "kd.alpha = 2.0"),
        ("grids: [{title: t, x: kd.alfa, vary: {kd.alfa: [0.5]}}]", "kd.alfa"),
        ("grids: [{title: t, x: seeds.x, vary: {seeds.x: [0.5]}}]", "seeds = {'x': 0.5}"),
        ("grids: [{title: t, x: device, vary: {device: [2001-01-01]}}]", "device = datetime"),
        ("grids: [{title: t, x: kd.alpha, vary: {kd.alpha: []}}]", "grids.0.vary.kd.alpha"),
        (f"grids: [{{title: t, x: a, vary: {{a: {[1] * 101}, b: {[1] * 100}}}}}]", "10,100 points"),
        ("target: x", "grids"),
        ("[", "bad.yaml"),
    ],
)
def test_a_bad_study_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, named: str):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "bad.yaml").write_text(text)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(UserError, match=named):
        load_study("bad")


@pytest.mark.parametrize(
    ("name", "hidden", "message"),
    [
        ("nothing", "", "mnist, pneumoniamnist"),
        ("mnist", "ray", "pip install -r requirements-ray.txt, or run <name> --one-by-one"),
        ("mnist", "", "RAY_ADDRESS=127.0.0.1:9: [Errno 111] Connection refused: name a running cluster"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, name: str, hidden: str, message: str):
    script = f"import sys; sys.modules['{hidden}'] = None; sys.argv = ['', 'run', '{name}']; import studies.study as s; s.main()"
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "RAY_ADDRESS": "127.0.0.1:9"}
    command, environment = [sys.executable, "-c", script], os.environ | settings
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", done.stderr)
