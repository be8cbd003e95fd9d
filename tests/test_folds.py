"""A cross-validation of a user's own file, without test images, through the whole graph."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.core.files import read_json
from pipeline.data.dataset import load_dataset
from pipeline.networks.description import read_description
from tests.checkout import Checkout
from tests.conftest import small_checkout, write_npz

pytestmark = pytest.mark.slow
REPORT = "report@distillation"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = small_checkout(tmp_path / "checkout", distillation__folds=3, seeds=[0, 1, 2])
    images = {"train_groups": np.arange(400) // 4, "val_groups": 100 + np.arange(100) // 4}
    write_npz(checkout.folder / "images.npz", test_images=None, test_labels=None, **images)
    return checkout


def test_every_image_is_tested_by_a_seed_that_did_not_see_its_patient(checkout: Checkout):
    output = checkout.dvc("repro", REPORT)
    assert "of the first of 3 folds" in output
    data = load_dataset(checkout.folder / "data/distillation")
    assert (data.folds, sum(data.images.values())) == (3, 500)
    with np.load(checkout.folder / "metrics/predictions/distillation.npz") as predictions:
        tested = ~np.isnan(predictions["student_distilled"][..., 0])
        patients = predictions["patients"]
    assert (tested.sum(axis=0) == 1).all()
    assert not set(patients[tested[0]]) & set(patients[tested[1]])
    exported = read_json(checkout.folder / "metrics/distillation_export.json")
    figures = read_json(checkout.folder / "metrics/detail/distillation.json")["models"]["student_distilled"]["figures"]
    seed = read_description(checkout.folder / "models/exported/distillation/student.safetensors").seed
    assert exported["pytorch"]["accuracy"] == pytest.approx(figures[seed]["accuracy"]), "of its own fold"
    report = (checkout.folder / "metrics/report.md").read_text()
    assert "over 3 seeds and 500 test images of 125 patients in 3 folds" in report
    assert len(checkout.mlflow_runs()) == 9 + 3, "a run for each training, and for each model"
    for deployment in ("publish", "registry distillation"):
        refused = checkout.run(*checkout.stage(f"serving.{deployment}"), expect=1).stderr
        assert "of a cross-validation, trained on a part of the images: train it with distillation.folds: null" in refused
    checkout.set(seeds=[0, 1])
    assert "distillation.folds = 3 wants seeds, as many of each fold, such as [0, 1, 2]" in checkout.dvc("repro", expect=255)
    checkout.set(seeds=[0, 1, 2], distillation__folds=None)
    assert "images.npz has no test images: give it some, or set the track's folds" in checkout.dvc("repro", REPORT, expect=255)


def test_a_teacher_that_has_seen_the_fold_is_refused_before_it_is_trained(checkout: Checkout):
    checkout.set(distill__ensemble=True)
    output = checkout.dvc("repro", "train_teacher", expect=255)
    assert "folds want a teacher of the student's own seed, neither an ensemble nor a file" in output
