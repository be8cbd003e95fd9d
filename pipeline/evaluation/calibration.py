"""Temperature scaling (Guo et al. 2017, section 4.2): one number that divides a model's logits, fitted on validation images.

`labels` are int arrays of shape (N,), `probabilities` float arrays of shape (N, K) whose rows sum to 1.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.evaluation.jackknife import TINY, ece, nll

BOUNDS = 0.01, 100  # of a temperature


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature of least NLL; 1 where every image is named rightly, so that the lower the better, without an end."""
    if (probabilities.argmax(axis=1) == labels).all():
        return 1.0
    logits, rows = _logits(probabilities), np.arange(len(labels))

    def loss(log_temperature: float) -> float:  # convex in 1 / temperature: one minimum
        return -log_softmax(logits * np.exp(-log_temperature), axis=1)[rows, labels].mean()

    fit = minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(fit.x))


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities, float64 (N, K), with the logits divided by `temperature`: the classes keep their order."""
    return softmax(_logits(probabilities) / temperature, axis=1)


def calibrated(labels: np.ndarray, probabilities: np.ndarray, temperature: float) -> dict[str, float]:
    """A temperature fitted elsewhere, and the NLL and ECE of images with it."""
    probabilities = scaled(probabilities, temperature)
    figures = {"nll_calibrated": nll(labels, probabilities)[0], "ece_calibrated": ece(labels, probabilities)[0]}
    return {"temperature": temperature} | figures


def _logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(float), TINY))
