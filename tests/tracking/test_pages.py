"""The page of `make ui` in a real browser: the table of results.

With SCREENSHOTS=<folder>, it is that of this checkout's own store instead of a small run's, and the picture that README.md
shows is written to the folder.
"""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from selenium import webdriver
from selenium.common import ElementNotInteractableException, NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.core.tracking_uri import tracking_uri
from pipeline.params import load_params
from pipeline.tracking.mirror import Mirror
from tests.browser import needs_browser, open_browser
from tests.checkout import free_port, wait_for
from tests.conftest import ROOT
from tests.tracking.samples import make_evaluation, make_record

SCREENSHOTS = os.environ.get("SCREENSHOTS")
OWN = tracking_uri()
CLOSE = "//*[@data-component-id='mlflow.assistant.chat_panel.close']"
AUC = "//*[@role='columnheader' and contains(@col-id, '`auc`')]"
COLUMNS = ("gain", "verdict", "accuracy")
SHARES = {
    "baselines": {"simple_cnn": 0.7, "resnet18": 0.9},
    "distillation": {"teacher": 0.95, "student_distilled": 0.9, "student_alone": 0.85},
}


@pytest.fixture
def uri(store: Path) -> str:
    """The address of a store with three seeds of every model, trained and evaluated; of the distilled student at T=6, too."""
    if SCREENSHOTS:
        return OWN
    mirror, records = Mirror(load_params(ROOT / "params.yaml").tracking.experiment), [make_record(seed) for seed in range(3)]
    for track, shares in SHARES.items():
        for record in (make_record(seed, model=model) for model in shares for seed in range(3)):
            mirror.training(record)
        mirror.evaluation(make_evaluation(*records, track=track, shares=shares))
    mirror.evaluation(make_evaluation(*records, shares=SHARES["distillation"] | {"student_distilled": 0.93}, temperature=6.0))
    return tracking_uri()


@pytest.fixture
def address(uri: str) -> Iterator[str]:
    """What `make ui` prints: the address of the table of results, in the UI that it has started."""
    port = free_port()
    environment = os.environ | {"PORT": str(port), "MLFLOW_TRACKING_URI": uri, "BROWSER": "true", "MLFLOW_WORKERS": "1"}
    command = [sys.executable, "-m", "pipeline.tracking.ui"]
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as server:
        try:
            line = server.stdout.readline().strip()
            assert line.startswith(f"http://127.0.0.1:{port}/#/experiments/")
            wait_for(port, server)
            yield line
        finally:
            os.killpg(server.pid, signal.SIGTERM)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path / "profile", "window-size=1720,1000") as browser:
        yield browser


@needs_browser
@pytest.mark.slow  # tests/reporting opens the report in Chromium
def test_make_ui_opens_the_table_of_results_which_answers_without_a_click(browser: webdriver.Chrome, address: str, uri: str):
    """A row for each model and setting, the most accurate first; what was varied stands in its name."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    evaluated = client.search_runs(experiments, "metrics.test_accuracy >= 0", order_by=["attributes.start_time ASC"])
    newest = {run.info.run_name: run for run in evaluated if "/seed" not in run.info.run_name}
    best_first = sorted(newest.values(), key=lambda run: run.data.metrics["test_accuracy"], reverse=True)
    ignored = [NoSuchElementException, StaleElementReferenceException, ElementNotInteractableException]
    wait = WebDriverWait(browser, 60, ignored_exceptions=ignored)

    def rows(_: webdriver.Chrome) -> list[list[str]]:
        shown = []
        for run in best_first:
            link = browser.find_element(By.XPATH, f"//a[contains(@href, '/runs/{run.info.run_id}')]")
            row = link.find_element(By.XPATH, "./ancestor::*[@row-id]").get_attribute("row-id")
            cells = [f"//*[@row-id='{row}']//*[contains(@col-id, '`{column}`')]" for column in COLUMNS]
            shown.append([link.location["y"], link.text, *(browser.find_element(By.XPATH, cell).text for cell in cells)])
        return shown

    browser.get(address)
    places, *_ = zip(*(shown := wait.until(rows, "a row for each model")), strict=True)
    assert list(places) == sorted(places)
    empty = dict.fromkeys(COLUMNS, "-")
    tags = {name: empty | run.data.tags for name, run in newest.items()}
    assert {name: cells for _, name, *cells in shown} == {name: [of[column] for column in COLUMNS] for name, of in tags.items()}
    if SCREENSHOTS:
        wait.until(lambda _: [browser.find_element(By.XPATH, CLOSE).click()], "the assistant, which opens for a new visitor")
        wait.until(lambda _: browser.find_element(By.XPATH, AUC), "the column for which there is room then")
        page = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        cropped = page.crop((195, 0, page.width, 510))
        cropped.quantize(256).save(Path(SCREENSHOTS) / "mlflow-results.png", optimize=True)
        return
    gains = [tags[f"student_distilled{varied}"]["gain"] for varied in ("", " T=6")]
    assert all(re.fullmatch(r"[+-]\d+\.\d\d \([+-]\S+ to [+-]\S+\) over student_alone", gain) for gain in gains)
    assert gains[0] != gains[1]
