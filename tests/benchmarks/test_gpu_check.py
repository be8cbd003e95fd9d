from pathlib import Path
from unittest import mock

import pytest

from benchmarks import gpu_check
from pipeline.training import loop


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "SIZES", {"distillation": (3, 64_000, 16_000), "baselines": (2, 8_000, 4_000)})
    monkeypatch.setattr(
        gpu_check, "VARIANTS", {name: gpu_check.VARIANTS[name] for name in ("compact_cnn, dkd", "resnet18, steps")}
    )
    monkeypatch.setattr(gpu_check, "AS_GOOD", 1.0)
    monkeypatch.setattr(gpu_check, "EPOCHS", 1)
    monkeypatch.setattr(gpu_check, "SEEDS", 1)


@pytest.mark.slow
def test_a_cpu_runs_every_line_but_the_capture(small: None, tmp_path: Path):
    with pytest.raises(SystemExit) as done:
        gpu_check.main("--device", "cpu", "--repeats", "1", "--results", str(tmp_path))
    assert not done.value.code
    (result,) = tmp_path.glob("*-check.md")
    text = result.read_text()
    assert "FAILED" not in text
    assert text.count("| to the bit     | to the bit ") == 4
    assert text.count("| the same  |") == 6
    assert "| student_distilled |" in text


def test_weights_that_differ_and_what_breaks_are_failures(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = gpu_check.prepared(gpu_check.choose_device("cpu"), tmp_path, dict.fromkeys(gpu_check.SIZES), 1)
    gpu_check.VARIANTS.pop("resnet18, steps")
    monkeypatch.setattr(gpu_check, "not_captured", lambda: mock.patch.object(loop, "_optimizer", other_rate(loop._optimizer)))
    _, (_, *rows), failures = gpu_check.steps(place)
    assert failures == 2
    assert [row[3] for row in rows] == ["to the bit"] * 2
    monkeypatch.setattr(gpu_check, "not_captured", lambda: mock.patch.object(loop, "_optimizer", None))
    place = place._replace(folder=tmp_path / "again")
    assert gpu_check.steps(place)[2] == 2


def other_rate(optimizer):
    def of_tenth(model, settings, *arguments):
        return optimizer(model, loop.Settings(**vars(settings) | {"lr": settings.lr / 10}), *arguments)

    return of_tenth
