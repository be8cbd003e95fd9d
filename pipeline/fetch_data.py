"""Stage fetch_data, alone to use the network: put a track's images, and the weights to start from, into data/<track>/."""

import sys
from pathlib import Path

from safetensors.torch import save

from pipeline.core.cli import run
from pipeline.core.files import atomic_folder, write_atomic
from pipeline.fetching.preparation import prepare
from pipeline.fetching.pretrained import imagenet_resnet18
from pipeline.fetching.sources import own_file, read_source
from pipeline.params import TRACKS, load_params


def main(track: str) -> None:
    block = getattr(load_params(), track)
    link_own_file(block.dataset, Path("data/own") / track)
    source = read_source(block.dataset, block.size)
    initial = {model: {} for model in TRACKS[track].models}  # an empty file: the model starts from random weights
    if track == "baselines" and block.pretrained:
        initial["resnet18"] = imagenet_resnet18()
    with atomic_folder(Path("data") / track) as folder:
        dataset = prepare(source, block.validation, folder)
        for model, tensors in initial.items():
            write_atomic(folder / "initial" / f"{model}.safetensors", save(tensors))
    images, shape = " / ".join(f"{number:,}" for number in dataset.images.values()), "x".join(map(str, dataset.image_shape))
    print(f"{track}: {dataset.name}, {images} training / validation / test images of {shape}")
    if shared := ", ".join(f"{number:,} {splits}" for splits, number in dataset.shared_images.items()):
        print(f"warning: {dataset.name} has equal images in two splits ({shared}): results on them may flatter", file=sys.stderr)


def link_own_file(dataset: str, folder: Path) -> None:
    """Link the user's own file into `folder`, on which this stage depends, so that DVC notices when it changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():
        if link.is_symlink():
            link.unlink()
    if (path := own_file(dataset)) and path.is_file():
        (folder / path.name).symlink_to(path)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
