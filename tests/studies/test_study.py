import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from studies import study as module
from studies.contrasts import Question
from studies.study import Point, Study, ask, load_study, sections
from studies.tasks import ROOT

SMALL = """
fixed: {seeds: [0, 1]}
grids:
  - title: labels
    x: distillation.label_fraction
    vary: {distillation.label_fraction: [0.1, 1.0], student: [{width: 4, hidden: 16}, {width: 8}]}
  - {title: temperature, x: kd.temperature, fixed: {student: {width: 4, hidden: 16}}, vary: {kd.temperature: [2.0, 5]}}
"""


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[Study, list[Point]]:
    (folder / "studies").mkdir()
    (folder / "studies" / "small.yaml").write_text(text)
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.setattr(module, "ROOT", folder)
    return load_study("small")


@pytest.mark.parametrize(
    ("name", "count"), [("mnist", 25), ("original", 1), ("retinamnist", 2), ("medical", 7), ("methods", 22), ("one_cycle", 2)]
)
def test_the_studies_here_have_valid_points_and_contrasts(name: str, count: int):
    study, points = load_study(name, threads=3)
    assert len({point.name for point in points}) == count
    assert {point.params.threads for point in points} == {3}
    assert sum(len(section.rows) for section in sections(points)) == len(points)
    for contrast in [*study.contrasts, *study.secondary]:
        assert ask(contrast, points, name).title == contrast.title


def test_points_are_all_combinations_with_blocks_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, points = load(tmp_path, monkeypatch, SMALL)
    assert len(points) == 4 + 2
    assert points[2].name == points[5].name  # in both grids
    chosen = {"distillation.label_fraction": 0.1, "student.width": 8, "student.hidden": 64, "kd.temperature": 5.0}
    assert points[1].settings == {"seeds": [0, 1]} | chosen
    assert points[1].params.flat(*chosen) == chosen
    assert points[1].labels == {key: chosen[key] for key in chosen if key != "kd.temperature"}


NAMED = """
fixed: {seeds: [0, 1, 2], evaluation: {primary: auc, margin: 0.03}}
named: {recipe: {plain: {distillation.epochs: 2}, strong: {distillation: {epochs: 3, schedule: cosine}}}}
grids:
  - {title: big, vary: {recipe: [plain, strong], kd: {soft: {kd.temperature: 9}, hard: {}}}, reference: {kd: soft}}
  - {title: small, fixed: {student: {width: 4}, evaluation.primary: nll}, vary: {recipe: [strong]}}
"""
CONTRASTS = """
contrasts:
  - {title: headroom, at: {grid: small}, model: teacher, other: student_alone}
secondary:
  - {title: recipe, at: {recipe: strong, student.width: 16, kd: hard}, model: student_alone, other: student_alone,
     other_at: {recipe: plain, student: {width: 16}, kd: hard}, claim: not_inferior, split: val, metric: accuracy}
  - {title: more, at: {grid: big, recipe: strong, kd: soft}, minus_at: {grid: big, recipe: plain, kd: soft}, margin: 0.1,
     model: student_distilled, other: student_alone}
"""


def test_settings_have_names_and_contrasts_pick_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study, points = load(tmp_path, monkeypatch, NAMED + CONTRASTS)
    assert [list(point.labels.values()) for point in points] == [
        ["plain", "soft"], ["plain", "hard"], ["strong", "soft"], ["strong", "hard"], ["strong"],
    ]  # fmt: skip
    assert points[2].params.flat("distillation.epochs", "distillation.schedule", "kd.temperature", "student.width") == {
        "distillation.epochs": 3, "distillation.schedule": "cosine", "kd.temperature": 9, "student.width": 16,
    }  # fmt: skip
    plain, _, strong, hard, small = (point.name for point in points)
    assert ask(study.contrasts[0], points, "") == (
        "headroom", ((1, small, "teacher"), (-1, small, "student_alone")), "nll", "test", "better", 0.03,
    )  # fmt: skip
    recipe, more = (ask(contrast, points, "") for contrast in study.secondary)
    assert recipe == (
        "recipe", ((1, hard, "student_alone"), (-1, points[1].name, "student_alone")), "accuracy", "val", "not_inferior", 0.03,
    )  # fmt: skip
    assert more.margin == 0.1
    assert more.terms == (
        (1, strong, "student_distilled"), (-1, strong, "student_alone"),
        (-1, plain, "student_distilled"), (1, plain, "student_alone"),
    )  # fmt: skip
    big, little = sections(points)
    assert [row.against and row.against.terms for row in big.rows] == [
        None, ((1, points[1].name, "student_distilled"), (-1, plain, "student_distilled")),
        None, ((1, hard, "student_distilled"), (-1, strong, "student_distilled")),
    ]  # fmt: skip
    assert (big.reference, little.reference, little.rows[0].gain.metric) == ("soft", "", "nll")


def test_a_reference_that_is_no_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points = load(tmp_path, monkeypatch, NAMED.replace("reference: {kd: soft}", "reference: {kd: warm}"))[1]
    with pytest.raises(UserError, match=r"big: no point has reference = {'kd': 'warm'}"):
        sections(points)


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ("at: {recipe: strong}", "small: c: {'recipe': 'strong'} describes 3 points, not one"),
        ("at: {grid: big, recipe: weak}", "describes 0 points"),
        ("at: {grid: small, kd.alfa: 1}", "not a parameter, nor a name of settings: .*alfa"),
        ("at: {grid: small}, other_at: {grid: other}", "c: the points have other seeds: nothing to pair"),
        ("at: {grid: small}, metric: f1", "secondary.0.metric = 'f1'"),
        ("at: {grid: small}, claim: better_or_equivalent", "two claims"),
    ],
)
def test_a_bad_contrast_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contrast: str, message: str):
    other = "  - {title: other, fixed: {seeds: [7, 8, 9]}, vary: {kd.alpha: [0.3]}}\n"
    text = f"{NAMED}{other}secondary: [{{title: c, model: teacher, other: student_alone, {contrast}}}]"

    def asked() -> Question:
        study, points = load(tmp_path, monkeypatch, text)
        return ask(study.secondary[0], points, "small")

    with pytest.raises(UserError, match=message):
        asked()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("grids: [{title: t, x: kd.alpha, vary: {kd.temperature: [1.0]}}]", "x = 'kd.alpha' is not varied"),
        ("grids: [{title: t, reference: {kd.alpha: 1}, vary: {kd.temperature: [1.0]}}]", "reference = 'kd.alpha' is not varied"),
        ("{named: {a: {b: {}}}, grids: [{title: t, vary: {a: [c]}}]}", "a = 'c' is none of b"),
        ("{named: {a: {b: {}}}, grids: [{title: t, vary: {a: [[b]]}}]}", r"a = \['b'\] is none of b"),
        ("{named: {a: {b: {}}}, grids: [{title: t, vary: {a: {b: {seeds: [0]}}}}]}", "a has settings here and in `named`"),
        ("{fixed: {seeds.x: 1}, grids: [{title: t, fixed: {seeds: [0]}, vary: {kd.alpha: [0.1]}}]}", "seeds.x: not a parameter"),
        ("grids: [{title: t, x: a, vary: {a: {b: {seeds: [0]}}}}]", "they make no axis"),
        ("grids: [{title: t, vary: {a: {b: {c: 1}}}}]", "c = 1"),
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
        ("nothing", "", "medical, methods, mnist, one_cycle, original, retinamnist"),
        pytest.param("mnist", "ray", "pip install -r requirements-ray.lock, or run <name> --one-by-one", marks=pytest.mark.slow),
        pytest.param("mnist", "", "RAY_ADDRESS=127.0.0.1:9: [Errno 111] Connection refused", marks=pytest.mark.slow),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, name: str, hidden: str, message: str):
    script = f"import sys; sys.modules['{hidden}'] = None; sys.argv = ['', 'run', '{name}']; "
    script += "import runpy; runpy.run_module('studies.study', run_name='__main__')"
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", done.stderr)
