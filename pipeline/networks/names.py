"""Which options of params.yaml an architecture takes. Needs no PyTorch; `architectures.build` knows the names."""

from typing import Any

OPTIONS = {"compact_cnn": ("width", "hidden"), "resnet18": ("stem",), "resnet34": ("stem",), "resnet50": ("stem",)}
# After their first weights these draw nothing from PyTorch's generators.
WITHOUT_DROPOUT = ("simple_cnn", "compact_cnn", "resnet18", "resnet34", "resnet50")
WITHOUT_PRETRAINED = ("simple_cnn", "compact_cnn")  # of these torchvision has no weights


def architecture_arguments(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of `options` (width, hidden, stem) those that the architecture `name` takes: none for most, and for unknown names."""
    return {option: options[option] for option in OPTIONS.get(name, ())}
