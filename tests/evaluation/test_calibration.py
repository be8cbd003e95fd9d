import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from pipeline.evaluation.calibration import calibrated, fit_temperature, scaled


def test_of_two_classes_it_is_logistic_regressions_without_intercept_or_penalty():
    random = np.random.default_rng(1)
    logit, labels = random.normal(0, 4, 300), random.integers(2, size=300)
    labels = np.where(random.random(300) < 0.7, logit > 0, labels).astype(int)
    probabilities = softmax(np.stack([np.zeros(300), logit], axis=1), axis=1)
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-9).fit(logit[:, None], labels)
    temperature = fit_temperature(labels, probabilities)
    assert 1 / temperature == pytest.approx(regression.coef_[0, 0], rel=1e-4)
    expected = regression.predict_proba(logit[:, None])
    np.testing.assert_allclose(scaled(probabilities, temperature), expected, atol=1e-5)
    figures = calibrated(labels, probabilities, temperature)
    assert figures["nll_calibrated"] == pytest.approx(log_loss(labels, expected), abs=1e-6)
    assert (figures["temperature"], figures["nll_calibrated"] < log_loss(labels, probabilities)) == (temperature, True)


def test_where_all_are_right_no_temperature_is_best_and_where_one_is_certain_and_wrong_there_is_still_one():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.0, 1.0]], np.float32)
    assert fit_temperature(np.array([0, 1, 1]), probabilities) == 1
    temperature = fit_temperature(np.array([0, 1, 0]), probabilities)
    assert 1 < temperature <= 100
    assert scaled(probabilities, temperature).argmax(axis=1).tolist() == [0, 1, 1]
