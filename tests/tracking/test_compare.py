"""Experiments side by side. tests/test_docs.py compares two that were run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.core.provenance import git, locked_parameters
from pipeline.evaluation.comparisons import write_evaluation
from pipeline.params import TRACKS
from pipeline.tracking import compare
from tests.tracking.samples import make_evaluation, make_record

HEADLINE = json.dumps({"teacher": {"accuracy": 0.9}, "gain": 0.01, "gain_low": -0.01, "gain_high": 0.03})


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Has git show these contents of metrics/distillation.json, by revision."""

    def prepare(contents: dict[str, str]) -> None:
        monkeypatch.setattr(compare, "revisions", lambda: {name: name for name in contents if name != "HEAD"})
        monkeypatch.setattr(compare, "locked_parameters", lambda revision: {"kd.temperature": len(revision), "epochs": 5})
        monkeypatch.setattr(
            compare, "git", lambda _, place: contents[place.partition(":")[0]] if place.endswith("/distillation.json") else ""
        )

    return prepare


def test_the_table_has_parameters_first_and_leaves_out_what_does_not_differ(show):
    show({"HEAD": HEADLINE, "warmer": HEADLINE.replace("0.9", "0.905")})
    heading, _, first, second = (line.split() for line in compare.table().splitlines())
    assert heading == ["experiment", "kd.temperature", "teacher"]
    assert (first, second) == (["HEAD", "4", "90.00"], ["warmer", "6", "90.50"])


@pytest.mark.parametrize("track", TRACKS)
def test_the_parameters_are_those_that_the_results_were_made_with(track: str):
    """params.yaml may name another data set by now."""
    table = git("show", f"HEAD:./metrics/{track}.md")
    assert table.startswith(f"{track}: {locked_parameters('HEAD')[f'{track}.dataset']}, ")


@pytest.mark.parametrize("damaged", ["[1]", '{"a":', '{"teacher": 1}', "\ufffd"])
def test_a_damaged_experiment_spoils_no_other(show, damaged: str, capsys):
    show({"HEAD": HEADLINE, "warmer": damaged})
    assert "warmer" in compare.table()
    assert capsys.readouterr().err.startswith("left out: warmer: metrics/distillation.json: ")


def test_what_cannot_be_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = [make_record(seed) for seed in range(3)]
    for name, temperature in (("a", None), ("b", 6.0)):
        write_evaluation(make_evaluation(*records, temperature=temperature), tmp_path / name)
    monkeypatch.setattr(compare, "_reader", lambda name: lambda path: (tmp_path / name / path).read_bytes())
    distilled, lone = compare.verdicts("a", "b")
    assert distilled.startswith("b against a, student_distilled: ")
    assert "3 seeds, 200 images" in distilled
    assert lone == "b against a, student_alone: the same checkpoints"
    with pytest.raises(UserError, match="no track has results in both"):
        compare.verdicts("a", "c")


@pytest.mark.parametrize(
    "changed",
    [
        {"comparisons": {}},
        {"comparisons": {"a": "b"}},
        {"comparisons": {"a": {"metric": [], "margin": 0}}},
        {"comparisons": {"a": {"metric": "accuracy", "margin": None}}},
        {"comparisons": {"a": {"metric": "accuracy", "margin": 1e9}}},
        {"images": 150},
        {"labels": 1},
    ],
)
def test_an_experiment_whose_files_were_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, changed: dict[str, Any]
):
    records = [make_record(seed) for seed in range(3)]
    write_evaluation(make_evaluation(*records), tmp_path / "a")
    theirs = make_evaluation(*records, temperature=6.0, images=changed.get("images", 200))
    write_evaluation(theirs._replace(labels=(theirs.labels + changed.get("labels", 0)) % 2), tmp_path / "b")
    detail = tmp_path / "b/metrics/detail/distillation.json"
    detail.write_text(json.dumps(json.loads(detail.read_text()) | changed))
    monkeypatch.setattr(compare, "_reader", lambda name: lambda path: (tmp_path / name / path).read_bytes())
    with pytest.raises(UserError, match="no track has results in both"):
        compare.verdicts("a", "b")
    assert capsys.readouterr().err.startswith("left out: distillation: ")


def test_a_terminal_sees_no_escapes_of_an_experiments(show, capsys):
    show({"HEAD": HEADLINE, "warmer": HEADLINE.replace("teacher", "\\u001b[2J")})
    compare.main("", "")
    assert "?[2J" in capsys.readouterr().out


def test_an_unknown_name_is_said():
    with pytest.raises(UserError, match="nosuch: no experiment and no git revision here"):
        compare.verdicts("HEAD", "nosuch")
