"""What a checkpoint says of itself. Needs no PyTorch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from pipeline.core.errors import UserError, user_error
from pipeline.data.dataset import Dataset

TRAIN_FIRST = "run the stage that trains this model first, or dvc repro, which runs what is missing"

Digest = Annotated[str, Field(pattern="^[0-9A-Za-z_-]{1,64}$")]  # safe in a path and in a search of MLflow's


class Epoch(BaseModel):
    """One pass over the training images. Losses are means per image, in nats; accuracies are shares of the images, 0-1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_loss: float  # the loss that was minimised, while the weights were changing
    train_accuracy: float  # likewise, of the labelled images
    val_loss: float | None  # cross-entropy after the epoch, whatever was minimised; None without validation images
    val_accuracy: float | None
    terms: dict[str, float] = {}  # of the training loss, where it is a sum of several
    val_auc: float | None = None  # where it selects the epoch


class Description(BaseModel):
    """Everything about a checkpoint that its weights do not say. Equal trainings have equal descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[4]  # of the file
    digest: Digest  # of everything that decided the training: its name in .trainings/ and in MLflow
    setting: Digest  # the same without the seed: what the seeds of one model have in common
    model: str  # the role, as in models/<track>/<model>
    architecture: str  # a name that architectures.build knows
    arguments: dict[str, Any]  # of that architecture
    dataset: Dataset  # classes, input scaling and fingerprint among it
    seed: int
    parameters: dict[str, Any]  # of the training and of its teacher's, by their key in params.yaml
    teachers_md5: list[Digest] = []  # of the checkpoints that it learned from
    device: str  # the type: cpu, cuda, mps
    history: list[Epoch] = []
    best_epoch: Annotated[int, Field(ge=0)] = 0  # 1-based; the weights are those after this epoch
    val_images: Annotated[int, Field(ge=0)] = 0  # that the epochs were measured on
    chance: Annotated[float, Field(ge=0, le=1)] = 0.0  # validation accuracy of always naming the commonest class

    def best(self) -> tuple[float, float]:
        """How good the weights are on the validation images, to compare with others': accuracy, then minus the loss.

        Without validation images all are equally good.
        """
        epoch = self.history[self.best_epoch - 1]
        return epoch.val_accuracy or 0.0, -(epoch.val_loss or 0.0)


def read_description(path: Path) -> Description:
    """The description in a checkpoint. Raises UserError for a file that is missing, damaged or no checkpoint."""
    if not path.exists():
        raise UserError(f"{path}: missing: {TRAIN_FIRST}")
    errors = OSError, SafetensorError, ValueError  # pydantic's among them
    with user_error(f"{path}: damaged, or no checkpoint of this project", *errors), safe_open(path, framework="np") as file:
        description = Description.model_validate_json((file.metadata() or {}).get("description", ""))
        if not 1 <= description.best_epoch <= len(description.history):
            raise ValueError(f"best_epoch {description.best_epoch} of {len(description.history)}")
        return description


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of one model, by seed. Raises UserError if there are none."""
    paths = {path.stem.removeprefix("seed"): path for path in folder.glob("seed*.safetensors")}
    if seeds := sorted(filter(str.isdecimal, paths), key=int):
        return [paths[seed] for seed in seeds]
    raise UserError(f"{folder}: no checkpoints: {TRAIN_FIRST}")


def checkpoint_path(folder: Path, seed: int) -> Path:
    """Where the checkpoint of one seed lies."""
    return folder / f"seed{seed}.safetensors"
