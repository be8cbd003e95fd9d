"""A description to save with weights."""

from pipeline.data.dataset import Dataset
from pipeline.networks.description import Description, Epoch

ARGUMENTS = {"width": 4, "hidden": 8}  # of a compact_cnn


def describe(dataset: Dataset, digest: str = "0" * 32) -> Description:
    """The description of a small trained student."""
    history = [Epoch(train_loss=0.1, train_accuracy=0.9, val_loss=0.2, val_accuracy=0.8)]
    names = {"digest": digest, "setting": "1" * 32, "model": "student_distilled", "seed": 3, "device": "cpu"}
    network = {"architecture": "compact_cnn", "arguments": ARGUMENTS, "dataset": dataset}
    parameters = {"kd.temperature": 5.0}
    return Description(
        format=4, **names, **network, parameters=parameters, history=history, best_epoch=1, val_images=100, chance=0.1
    )
