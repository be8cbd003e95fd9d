"""The peer: the same trainings written the ordinary way, as PyTorch's tutorials do.

Images pass one by one as PIL images through torchvision's transforms in a DataLoader, arithmetic is eager float32, and the
teacher is asked again for every batch of every epoch. `careful` turns on what a careful user would: worker processes, pinned
memory, channels-last memory format.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18


class Images(Dataset):
    """Arrays of images (N, H, W, C) and labels (N,), given out as a transformed PIL image and an int."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: float, std: float) -> None:
        self.images = images.squeeze(-1) if images.shape[-1] == 1 else images
        self.labels = labels
        channels = images.shape[-1]
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,) * channels, (std,) * channels)])

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """One image, float32 of shape (C, H, W), and its label."""
        return self.transform(Image.fromarray(self.images[number])), int(self.labels[number])


def network(name: str, channels: int, classes: int) -> nn.Module:
    """One of the five networks for 28x28 images, of the original course project's shapes."""
    if name == "resnet18":
        model = resnet18(num_classes=classes)
        if channels == 1:
            model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        return model
    if name == "simple_cnn":
        return nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, classes)),
        )
    width, hidden = (32, 128) if name == "teacher" else (16, 64)
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(288 * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
    )


class Trained(NamedTuple):
    """A trained model and, by epoch, the seconds that it took and the figure on the validation images after it."""

    model: nn.Module
    seconds: list[float]
    figures: list[float]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images (N,) whose label (N,) has the largest of their logits (N, K), 0-1."""
    return (logits.argmax(1) == labels).float().mean().item()


def train(
    name: str,
    train_set: Images,
    val_set: Images,
    classes: int,
    device: torch.device,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    careful: bool,
    figure: Callable[[Tensor, Tensor], float] = accuracy,
    target: float = float("inf"),
    teacher: nn.Module | None = None,
) -> Trained:
    """Train one network until its `figure` on the validation images reaches `target`, for at most `epochs`.

    With a `teacher`, on 0.7 * CE + 0.3 * 25 * KL at temperature 5.
    """
    torch.manual_seed(seed)
    channels = train_set[0][0].shape[0]
    model = network(name, channels, classes).to(device)
    options = {}
    if careful:
        model = model.to(memory_format=torch.channels_last)
        options = {"num_workers": 2, "persistent_workers": True, "pin_memory": device.type == "cuda"}
    loader = DataLoader(train_set, batch_size=batch_size, shuffle=True, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    validation = DataLoader(val_set, batch_size=250)
    seconds, figures = [], []
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if careful:
                images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    soft = F.softmax(teacher(images) / 5, dim=1)
                divergence = F.kl_div(F.log_softmax(logits / 5, dim=1), soft, reduction="batchmean")
                loss = 0.7 * loss + 0.3 * 25 * divergence
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(images.to(device)).cpu() for images, _ in validation])
        figures.append(figure(logits, torch.from_numpy(val_set.labels)))
        seconds.append(time.perf_counter() - start)
        if figures[-1] >= target:
            break
    return Trained(model, seconds, figures)
