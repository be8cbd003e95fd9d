import json
import re
from pathlib import Path

import pandas as pd
import pytest
from dvc_render.vega import VegaRenderer

from pipeline.evaluation.comparisons import Evaluation, write_evaluation
from pipeline.params import TRACKS
from tests.conftest import ROOT


@pytest.mark.parametrize(("name", "x", "y"), [("losses", "epoch", "loss"), ("confusion", "predicted", "actual")])
def test_dvc_fills_the_templates(name: str, x: str, y: str, evaluation: Evaluation, tmp_path: Path):
    write_evaluation(evaluation, tmp_path)
    frame = pd.read_csv(tmp_path / f"metrics/plots/distillation/{name}.csv", dtype=str)
    points = [row | {"rev": rev} for rev in ("HEAD", "workspace") for row in frame.to_dict("records")]
    content = VegaRenderer(points, name, template=name, template_dir=str(ROOT / ".dvc/plots"), x=x, y=y).get_filled_template()
    assert content["data"].pop("values") == points
    text = json.dumps(content)
    assert "DVC_METRIC" not in text
    computed = set(re.findall(r'"as": "(\w+)"', text))
    assert set(re.findall(r'"field": "(\w+)"', text)) <= set(points[0]) | computed


def test_the_rows_of_the_confusion_matrices_are_every_model_in_order():
    """Without an order for the rows, Vega-Lite puts the matrices of several revisions under wrong headings."""
    rows = json.loads((ROOT / ".dvc/plots/confusion.json").read_text())["facet"]["row"]["sort"]
    assert rows == [model for track in TRACKS.values() for model in track.models]
