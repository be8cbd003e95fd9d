"""A teacher from outside: the user's file of logits, or of features, of which logistic regression makes logits (a linear probe).

Everything in the file is checked before it is used. What comes of it takes the place of the teacher's checkpoints.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.files import atomic_folder, md5
from pipeline.data.augmentation import check_augmentation, view_indices
from pipeline.data.dataset import SPLITS, Dataset
from pipeline.data.labels import known_labels
from pipeline.data.npy import read_npz
from pipeline.data.prepared import Split, TrainingData
from pipeline.networks.outside import OutsideTeacher, write_outside

PARTS = ("train", "unlabelled", "val", "test")  # of the user's file
WITH_VIEWS = ("train", "unlabelled")
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # of a probe, as scikit-learn's C
WITHOUT_VALIDATION = 1.0  # C where nothing can choose it: scikit-learn's default
ITERATIONS = 500  # of L-BFGS, at most
LARGEST = float(np.finfo(np.float32).max) / 4  # beyond it a difference of two logits overflows
BATCH = 4096  # rows

Kind = Literal["logits", "features"]


def write_teachers(
    file: Path,
    kind: Kind,
    data: TrainingData,
    folder: Path,
    seeds: Sequence[int],
    augmentation: str = "none",
    label_fraction: float = 1.0,
    threads: int = 1,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Fill `folder` with the teacher of each seed, `seed<k>.npz` as in networks.outside, made of the user's `file`.

    A linear probe sees the labels that the seed's teacher may see, and computes with `threads` threads. Raises UserError for a
    file that does not fit the prepared set `data` or lacks the views of `augmentation`; `folder` is then as before.
    """
    dataset = data.dataset
    check_augmentation(augmentation, dataset.name)
    indices = view_indices(augmentation, *dataset.image_shape[:2])
    arrays = read_file(file, kind, dataset, None if indices is None else len(indices))
    checksum = md5(file)
    facts = [kind, checksum, dataset.fingerprint, augmentation, label_fraction if kind == "features" else None]
    described = {
        "kind": "logits" if kind == "logits" else "linear probe",
        "file": file.name,
        "file_md5": checksum,
        "setting": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32],
        "fingerprint": dataset.fingerprint,
        "parameters": dict(parameters or {}),
        "splits": [split for split in SPLITS if split in arrays],
    }
    with atomic_folder(folder) as made:
        for number, seed in enumerate(seeds):
            if kind == "logits":
                outputs, probe = arrays, {}
            elif label_fraction < 1 or number == 0:  # with all labels, the probe is every seed's
                outputs, probe = linear_probe(arrays, data, label_fraction, seed, threads)
                print(f"teacher/seed{seed}: linear probe on {file.name}, C = {probe['c']:g}", flush=True)
            write_outside(made / f"seed{seed}.npz", OutsideTeacher(**described, **probe), _joined(outputs))


def _joined(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits by split, float32: those of unlabelled images behind those of training images, as the images lie."""
    logits = {part: np.asarray(array, np.float32) for part, array in outputs.items()}
    if "unlabelled" in logits:
        logits["train"] = np.concatenate([logits["train"], logits["unlabelled"]])
    return logits


def read_file(file: Path, kind: Kind, dataset: Dataset, views: int | None) -> dict[str, np.ndarray]:
    """The arrays of the user's file by part (train, unlabelled, val, test), of floats, mapped from the disk.

    Logits are (N, K), features (N, D); of training and unlabelled images, where there are `views`, (N, V, K) and (N, V, D).
    Raises UserError if a part is missing that is needed, and for other rows, classes, data or numbers than those wanted.
    """
    where, keys = f"teacher.{kind}: {file.name}", {part: f"{part}_{kind}" for part in PARTS}
    content = read_npz(file, ["fingerprint", *keys.values()])
    fingerprint = str(content.get("fingerprint", ""))
    if fingerprint != dataset.fingerprint:
        given = f"is {fingerprint[:12]}..." if fingerprint else "is missing"
        wanted = f"data/distillation/dataset.json has {dataset.fingerprint[:12]}..."
        raise UserError(f"{where}: fingerprint {given}, {wanted}: the file must be of these images in this order")
    arrays = {part: content[key] for part, key in keys.items() if key in content}
    wanted = ["train", *(part for part in _needed(kind) if dataset.images.get(part))]
    if missing := [keys[part] for part in wanted if part not in arrays]:
        raise UserError(f"{where}: {missing[0]} is missing")
    width = len(dataset.classes) if kind == "logits" else max((1, *arrays["train"].shape[-1:]))
    for part, array in arrays.items():
        _check(f"{where}: {keys[part]}", kind, array, dataset.images.get(part, 0), views if part in WITH_VIEWS else None, width)
    return arrays


def _needed(kind: Kind) -> tuple[str, ...]:
    return ("unlabelled",) if kind == "logits" else ("unlabelled", "val")  # a probe is chosen on validation


def _check(where: str, kind: Kind, array: np.ndarray, images: int, views: int | None, width: int) -> None:
    shape = (images, width) if views is None else (images, views, width)
    if array.shape != shape:
        axes = f"images{', views of the augmentation' if views else ''}, {'classes' if kind == 'logits' else 'features'}"
        raise UserError(f"{where} has shape {array.shape}, not {shape}: {axes}")
    if array.dtype.kind != "f":
        raise UserError(f"{where} has dtype {array.dtype}, not one of floats")
    for start in range(0, images, BATCH):
        if not (np.abs(array[start : start + BATCH].astype(np.float64)) <= LARGEST).all():
            rows = f"{start} to {min(start + BATCH, images) - 1}"
            raise UserError(f"{where} has a value that is no finite number of float32, in rows {rows}")


def linear_probe(
    features: Mapping[str, np.ndarray], data: TrainingData, share: float, seed: int, threads: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Logits by part, float32, of a logistic regression on standardised features; and its number of weights and C.

    It sees the labels that labels.known_labels draws by `share` and `seed`, and of images with views the first, the image
    itself. Of `STRENGTHS`, the C with the smallest cross-entropy on the known validation labels is taken. Raises UserError if a
    class has no labelled image.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    def labelled(part: str, split: Split) -> tuple[np.ndarray, np.ndarray]:
        rows = known_labels(split.labels, share, seed).numpy()
        of_part = features[part] if features[part].ndim == 2 else features[part][:, 0]
        return of_part[rows].astype(np.float64), split.labels.numpy()[rows]

    classes = range(len(data.dataset.classes))
    inputs, labels = labelled("train", data.train)
    if absent := set(classes) - set(labels.tolist()):
        raise UserError(f"teacher.features: no labelled training image of class {min(absent)}")
    strengths = STRENGTHS if len(data.val.labels) else (WITHOUT_VALIDATION,)
    probes = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=ITERATIONS)) for c in strengths]
    # One that has not converged is one that was stopped early: validation judges it as it is.
    with threadpool_limits(threads), warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        losses = [0.0]
        for probe in probes:
            probe.fit(inputs, labels)
        if len(probes) > 1:
            val_inputs, val_labels = labelled("val", data.val)
            losses = [log_loss(val_labels, probe.predict_proba(val_inputs), labels=classes) for probe in probes]
        best = int(np.argmin(losses))
        logits = {part: _logits(probes[best], array) for part, array in features.items()}
    regression = probes[best][-1]
    return logits, {"c": strengths[best], "weights": regression.coef_.size + regression.intercept_.size}


def _logits(probe: Any, features: np.ndarray) -> np.ndarray:
    """A probe's logits, float32 (..., K), for features (..., D); of two classes, the first has 0."""
    rows = features.reshape(-1, features.shape[-1])
    outputs = [probe.decision_function(rows[start : start + BATCH].astype(np.float64)) for start in range(0, len(rows), BATCH)]
    logits = np.concatenate(outputs) if outputs else np.empty((0, max(len(probe.classes_), 1)))
    if logits.ndim == 1:
        logits = np.stack([np.zeros_like(logits), logits], axis=1)
    return logits.astype(np.float32).reshape(*features.shape[:-1], logits.shape[-1])
