"""Stage evaluate: measure a track's models on the test images and put the figures into metrics/ and MLflow."""

import io
from pathlib import Path

import numpy as np

from pipeline.data.dataset import load_dataset
from pipeline.data.prepared import load_split
from pipeline.core.cli import run
from pipeline.evaluation.comparisons import (
    compare_models,
    how_it_was_run,
    measure_track,
    predictions,
    summarise,
    summarise_classes,
)
from pipeline.evaluation.plots import write_plots
from pipeline.reporting.tables import results_table
from pipeline.evaluation.tracks import MODELS
from pipeline.core.files import write_json, write_atomic
from pipeline.networks.inference import choose_device
from pipeline.params import load_params
from pipeline.publishing import publish_summary, publish_tests
from pipeline.tracking.mirror import Tracker


def main(track: str) -> None:
    params = load_params()
    data = Path("data") / track
    dataset = load_dataset(data)
    measured = measure_track(track, dataset, load_split(data, "test", choose_device(params.device)))
    metrics = {model: summarise(runs) for model, runs in measured.items()}
    comparisons = compare_models(track, measured)
    by_class = {model: summarise_classes(runs) for model, runs in measured.items()}
    how = how_it_was_run(dataset, measured)
    table = results_table(track, metrics, dataset, len(measured[MODELS[track][0]]))
    plots = Path("metrics/plots") / track
    write_plots(plots, track, measured, comparisons)
    write_json(Path(f"metrics/{track}.json"), metrics)
    write_json(Path(f"metrics/{track}_comparisons.json"), {key: one.as_json() for key, one in comparisons.items()})
    write_json(Path(f"metrics/{track}_by_class.json"), by_class)
    write_json(Path(f"metrics/{track}_run.json"), how)
    write_atomic(Path(f"metrics/{track}.md"), table)
    said = io.BytesIO()
    np.savez_compressed(said, **predictions(measured))
    write_atomic(Path(f"metrics/predictions/{track}.npz"), said.getvalue())
    tracker = Tracker(params.tracking.experiment)
    publish_tests(tracker, measured)
    publish_summary(tracker, track, metrics, comparisons, how, table, plots)
    print(f"\n{table}")


if __name__ == "__main__":
    run(main, track=tuple(MODELS))
