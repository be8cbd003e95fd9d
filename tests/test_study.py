import subprocess
import sys

import pandas as pd
import pytest

from pipeline.core.errors import UserError
from studies import study as module
from studies.study import Study, all_points, flat, load_study, markdown, name_of, plot
from tests.conftest import ROOT

SMALL = Study.model_validate(
    {
        "target": "evaluate@distillation",
        "fixed": {"seeds": [0, 1]},
        "grids": [
            {
                "title": "labels",
                "x": "distillation.label_fraction",
                "vary": {
                    "distillation.label_fraction": [0.1, 1.0],
                    "student": [{"width": 4, "hidden": 16}, {"width": 8, "hidden": 32}],
                },
            },
            {
                "title": "temperature",
                "x": "kd.temperature",
                "fixed": {"student": {"width": 4, "hidden": 16}},
                "vary": {"kd.temperature": [2.0, 5.0]},
            },
        ],
    }
)


@pytest.mark.parametrize("name", ["mnist", "pneumoniamnist"])
def test_the_studies_here_have_valid_points_enough(name: str):
    assert len(all_points(name, load_study(name))) >= 24


def test_points_are_all_combinations_with_blocks_spelt_out():
    points = [point for _, point in SMALL.points(SMALL.grids[0])]
    assert len(points) == 4
    assert points[0] == {
        "seeds": [0, 1],
        "distillation.label_fraction": 0.1,
        "student.width": 4,
        "student.hidden": 16,
    }


def test_the_same_settings_have_the_same_name_in_any_order():
    one, two = {"kd.alpha": 0.1, "kd.temperature": 2.0}, {"kd.temperature": 2.0, "kd.alpha": 0.1}
    assert name_of("s", one) == name_of("s", two) != name_of("s", one | {"kd.alpha": 0.2})


@pytest.fixture
def frame() -> pd.DataFrame:
    points = all_points("small", SMALL)
    result = {"accuracy_teacher": 0.98, "accuracy_student_alone": 0.96, "accuracy_student_distilled": 0.97}
    result |= {"gain": 0.01, "low": 0.004, "high": 0.016, "detectable": 0.005, "verdict": "better"}
    rows = [point | result for name, point in points.items()]
    return pd.DataFrame(rows, index=list(points))


def test_the_table_has_a_row_per_finished_point(frame: pd.DataFrame):
    varied = ["distillation.label_fraction", "student.width"]
    text = markdown("small", SMALL, frame.iloc[:4], varied, 6)
    assert "4 of 6 points finished" in text
    assert "better 4, worse 0, not distinguishable 0" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2][:2] == ["0.1", "4"]
    assert rows[2][-3:] == ["+1.00", "+0.40 to +1.60", "better"]
    assert len(rows) == 2 + 4


def test_the_figure_has_a_panel_per_grid_and_a_line_per_setting(frame: pd.DataFrame):
    panels = plot("small", SMALL, frame).axes
    assert [panel.get_title() for panel in panels] == ["labels", "temperature"]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["student width 4", "student width 8"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("target: x\ngrids: [{title: t, x: kd.alpha, vary: {kd.temperature: [1.0]}}]", "x = 'kd.alpha' is not varied"),
        ("target: x\ngrids: [{title: t, x: kd.alpha, vary: {kd.alpha: [2.0]}}]", "kd.alpha = 2.0"),
        ("target: x\ngrids: [{title: t, x: kd.alfa, vary: {kd.alfa: [0.5]}}]", "kd.alfa"),
        (
            "target: x\nfixed: {processes: 2}\ngrids: [{title: t, x: kd.alpha, vary: {kd.alpha: [0.5]}}]",
            "processes = 2",
        ),
        ("target: x\ngrid: []", "grids"),
        ("target: [", "bad.yaml"),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_run(tmp_path, monkeypatch, text: str, named: str):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "bad.yaml").write_text(text)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(UserError, match=named):
        load_study("bad")


def test_an_unknown_study_is_one_line():
    command = [sys.executable, "-m", "studies.study", "run", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "mnist, pneumoniamnist" in done.stderr


def test_blocks_are_spelt_out():
    assert flat({"student": {"width": 4}, "kd.alpha": 0.5}) == {"student.width": 4, "kd.alpha": 0.5}


def test_without_ray_a_run_says_what_to_do():
    hidden = "import sys; sys.modules['ray'] = None; sys.argv = ['study', 'run', 'mnist']; import studies.study as s; s.main()"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: a study runs on Ray, which is not installed: pip install -r requirements-ray.txt, or run <name> --one-by-one\n"
    )
