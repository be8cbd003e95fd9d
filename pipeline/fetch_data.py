"""Stage fetch_data: put a track's images, and the weights its networks start from, into data/<track>/.

The only stage that uses the network.
"""

from pathlib import Path

from safetensors.torch import save

from pipeline.core.cli import run
from pipeline.core.files import atomic_folder, write_atomic
from pipeline.fetching.preparation import prepare
from pipeline.fetching.pretrained import imagenet_resnet18
from pipeline.fetching.sources import own_file, read_source
from pipeline.params import TRACKS, load_params


def main(track: str) -> None:
    params = load_params()
    block = {"baselines": params.baselines, "distillation": params.distillation}[track]
    link_own_file(block.dataset, Path("data/own") / track)
    source = read_source(block.dataset, block.size)
    initial = {}
    if track == "baselines":  # a model without published weights gets an empty file: it starts from random ones
        initial = {"simple_cnn": {}, "resnet18": imagenet_resnet18() if params.baselines.pretrained else {}}
    with atomic_folder(Path("data") / track) as folder:
        dataset = prepare(source, block.validation, folder)
        for model, tensors in initial.items():
            write_atomic(folder / "initial" / f"{model}.safetensors", save(tensors))
    print(f"{track}: {dataset.name}, images {dataset.images}, shape {dataset.image_shape}")


def link_own_file(dataset: str, folder: Path) -> None:
    """Link the user's own file into `folder`, on which this stage depends, so that DVC notices when it changes."""
    path = own_file(dataset)
    for link in folder.iterdir():
        if link.is_symlink():
            link.unlink()
    if path and path.is_file():
        (folder / path.name).symlink_to(path)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
