"""Stage fetch_data, alone to use the network: put a track's images, and the weights to start from, into data/<track>/.

A network that cannot take such images, or be exported as a student, is refused here, before anything is trained.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import atomic_folder, main_checkout, write_atomic
from pipeline.data.dataset import Dataset
from pipeline.data.npy import read_npy
from pipeline.fetching.preparation import prepare
from pipeline.fetching.pretrained import imagenet_weights
from pipeline.fetching.sources import KEYS, Source, own_file, read_source, unread
from pipeline.networks.architectures import ARCHITECTURES, check_architecture
from pipeline.params import TRACKS, load_params

NAMED = 5  # arrays or classes that a warning names
FEWEST = 10  # test images of a class, and patients, as in evaluation/statistics.py, which no stage here depends on


def main(track: str) -> None:
    params, plan, folder = load_params(), TRACKS[track], Path("data") / track
    block = getattr(params, track)
    links = Path("data/own") / track
    link_own_file(own_file(block.dataset), links)
    if track == "distillation":
        link_own_file(params.teacher.file, links / "teacher")
        if (file := params.teacher.file) and not file.is_file():
            raise UserError(f"teacher {file}: there is no such file (a relative path counts from {main_checkout()})")
    source, pretrained = read_source(block.dataset, block.size), params.pretrained(track)
    shape, classes = source.splits["train"][0].shape[1:], len(source.classes)
    for model in (plan.teacher, plan.alone):
        check_architecture(*params.network(track, model), shape, classes)
    student, arguments = params.network(track, plan.alone)
    if student not in ARCHITECTURES:  # those are known to be exported
        from pipeline.export.onnx_export import check_export

        check_export(student, arguments, shape, classes)
    dataset = write(source, block.validation, pretrained, folder, block.folds)
    images = " / ".join(f"{number:,}" for number in dataset.images.values())
    of_folds = f", of the first of {dataset.folds} folds" if dataset.folds else ""
    print(f"{track}: {dataset.name}, {images} {' / '.join(dataset.images)} images of {'x'.join(map(str, shape))}{of_folds}")
    for weakness in weaknesses(dataset, folder, unread(path) if (path := own_file(block.dataset)) else []):
        print(one_line(f"warning: {dataset.name}{weakness}"), file=sys.stderr)


def weaknesses(dataset: Dataset, folder: Path, not_read: Sequence[str]) -> Iterator[str]:
    """What of a prepared set in `folder` may be a mistake, or weakens its results; `not_read` are arrays of the user's file."""
    if not_read:
        yield f": nothing reads its arrays {_first(not_read)}; known are {', '.join(KEYS)}"
    if shared := ", ".join(f"{number:,} {splits}" for splits, number in dataset.shared_images.items()):
        yield f" has equal images in two splits ({shared}): results on them may flatter"
    for split, what in (("val", "is chosen"), ("test", "is measured")):
        present = {*read_npy(folder / split / "labels.npy").tolist()}
        absent = [name for label, name in enumerate(dataset.classes) if present and label not in present]
        if absent:
            yield f" has no {split} image of class {_first(absent)}: nothing {what} by it"
    labels, whose = read_npy(folder / "test" / "labels.npy"), folder / "test" / "patients.npy"
    cases, kind = (read_npy(whose), "patients") if whose.exists() else (np.arange(len(labels)), "images")
    if kind == "patients" and (number := len(np.unique(cases))) < FEWEST:
        yield f" has {number} test patients: no verdict is on fewer than {FEWEST}"
        return
    counts = {name: len(np.unique(cases[labels == label])) for label, name in enumerate(dataset.classes)}
    if few := [f"{name} ({number})" for name, number in counts.items() if 0 < number < FEWEST]:
        yield f" has few test {kind} of class {_first(few)}: verdicts on AUC and balanced accuracy want {FEWEST} of each"


def _first(names: Sequence[str]) -> str:
    return f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"


def write(
    source: Source, validation: float, pretrained: Mapping[str, str | None], folder: Path, folds: int | None = None
) -> Dataset:
    """Put what trainings read into `folder`: the prepared set, and a file of weights to start from by the names in `pretrained`.

    Those are torchvision's of an architecture, none for None. `validation` and `folds` as in `prepare`.
    """
    initial = {name: imagenet_weights(architecture) if architecture else {} for name, architecture in pretrained.items()}
    with atomic_folder(folder) as partial:
        dataset = prepare(source, validation, partial, folds)
        for name, tensors in initial.items():
            write_atomic(partial / "initial" / f"{name}.safetensors", save(tensors))
    return dataset


def link_own_file(path: Path | None, folder: Path) -> None:
    """Link the user's own file into `folder`, on which stages depend, so that DVC notices when it changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():
        if link.is_symlink():
            link.unlink()
    if path and path.is_file():
        # Named by its place, too: DVC would take equal files in two places for one, and watch the wrong one.
        (folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:8]}-{path.name}").symlink_to(path)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
