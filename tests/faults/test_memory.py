"""As many classes as a set may have, of names as long and as awkward as they may be: what the stages need that name them all."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.files import write_json
from pipeline.data.dataset import SPLITS, load_dataset
from pipeline.fetching.sources import LONGEST_CLASS, MOST_CLASSES
from tests.conftest import small_checkout, write_npz
from tests.evaluation.samples import PLAN, SEEDS, save
from tests.faults.conftest import FULL
from tests.reporting.conftest import COSTS, EXPORTED

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not FULL, reason="minutes: make faults")]
MARKUP = '"<img src=x onerror=alert(1)>", | ![x](/etc/passwd) $x^2$ {{ 7 * 7 }} \U0001f480'
# Runs a command, then prints the largest resident set of its processes, in kB.
WATCH = "import resource as r, subprocess as s, sys; s.check_call(sys.argv[1:]); print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)"


def test_a_thousand_classes_of_hostile_names_are_measured_and_reported(tmp_path: Path, outcome):
    checkout, labels = small_checkout(tmp_path / "checkout", seeds=SEEDS), np.arange(3 * MOST_CLASSES) % MOST_CLASSES
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
    parts = {f"{split}_images": images for split in SPLITS} | {f"{split}_labels": labels for split in SPLITS}
    names = np.array([f"{number:04} {MARKUP}".ljust(LONGEST_CLASS, "'") for number in range(MOST_CLASSES)])
    write_npz(checkout.folder / "images.npz", **parts, class_names=names)
    checkout.run(*checkout.stage("fetch_data distillation"))
    dataset, peaks = load_dataset(checkout.folder / "data/distillation"), []
    for model, seed in ((model, seed) for model in PLAN.models for seed in SEEDS):
        save(checkout.folder / "models/distillation", dataset, model, seed)
    write_json(checkout.folder / "metrics/distillation_costs.json", COSTS)
    write_json(checkout.folder / "metrics/distillation_export.json", EXPORTED)
    for stage in ("evaluate", "report"):
        done = checkout.run(sys.executable, "-c", WATCH, *checkout.stage(f"{stage} distillation"), timeout=600)
        peaks.append(f"{stage} {1024 * int(done.stdout.split()[-1]) / 1e9:.1f} GB")
    outcome.fault, outcome.injected = f"{MOST_CLASSES:,} classes of hostile names", len(peaks)
    outcome.details = f"peak memory: {', '.join(peaks)}"
