"""Results of points that nobody trained."""

import numpy as np

from pipeline.core.files import write_json
from pipeline.evaluation.metrics import score
from studies.study import Point
from studies.tasks import MODELS, plan, result_path

SKILL = {"teacher": 2.0, "student_distilled": 1.6, "student_alone": 1.0}  # of the logit that is right


def write_result(point: Point, images: int = 120, **skill: float) -> dict[str, np.ndarray]:
    """Predictions of two classes by every seed and model, as the task evaluate leaves them; the arrays."""
    path, skills = result_path(plan(point.params)[-1].digest), SKILL | skill
    noise, arrays, figures = np.random.default_rng(0), {}, {}
    for split in ("test", "val"):
        arrays[f"{split}_labels"] = labels = np.arange(images) % 2
        hard = noise.normal(size=images)  # how hard an image is, for all alike
        for model in MODELS:
            scores = skills[model] * (2 * labels - 1) + hard + noise.normal(0, 0.3, (len(point.params.seeds), images))
            positive = 1 / (1 + np.exp(-scores))
            arrays[f"{split}_{model}"] = np.stack([1 - positive, positive], axis=2).astype(np.float32)
        figures[split] = {model: [score(labels, seed) for seed in arrays[f"{split}_{model}"]] for model in MODELS}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **arrays)
    write_json(path, {"seeds": point.params.seeds, "figures": figures})
    return arrays
