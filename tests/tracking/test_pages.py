"""The pages of the MLflow UI in a real browser, on the way of a user who asks whether distilling the student was worth it.

With SCREENSHOTS=<folder>, the first page is that of this checkout's own store instead of a small run's, and the picture that
README.md shows is written to the folder.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from selenium import webdriver
from selenium.common import ElementNotInteractableException, NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.core.tracking_uri import tracking_uri
from pipeline.params import load_params
from pipeline.tracking.mirror import Mirror
from tests.browser import needs_browser, open_browser
from tests.checkout import free_port, wait_for
from tests.conftest import ROOT
from tests.tracking.samples import make_evaluation, make_record

SCREENSHOTS = os.environ.get("SCREENSHOTS")
CLOSE = "//*[@data-component-id='mlflow.assistant.chat_panel.close']"
COLUMNS = ("gain", "verdict", "accuracy")
SHARES = {
    "baselines": {"simple_cnn": 0.7, "resnet18": 0.9},
    "distillation": {"teacher": 0.95, "student_distilled": 0.9, "student_alone": 0.85},
}

pytestmark = [
    needs_browser,
    pytest.mark.slow,  # tests/reporting opens the report in Chromium
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, new_store: bytes) -> str:
    """The address of a store with three seeds of every model, trained and evaluated; of the distilled student at T=6, too."""
    if SCREENSHOTS:
        return tracking_uri()
    folder = tmp_path_factory.mktemp("main")
    (folder / "mlflow.db").write_bytes(new_store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mirror, records = Mirror(load_params(ROOT / "params.yaml").tracking.experiment), [make_record(seed) for seed in range(3)]
        for track, shares in SHARES.items():
            for record in (make_record(seed, model=model) for model in shares for seed in range(3)):
                mirror.training(record)
            mirror.evaluation(make_evaluation(*records, track=track, shares=shares))
        mirror.evaluation(make_evaluation(*records, shares=SHARES["distillation"] | {"student_distilled": 0.93}, temperature=6.0))
        return tracking_uri()


@pytest.fixture(scope="module")
def runs(store: str) -> dict[str, Run]:
    """The newest evaluated runs by name: the models' and their seeds'."""
    client = MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    evaluated = client.search_runs(experiments, "metrics.test_accuracy >= 0", order_by=["attributes.start_time ASC"])
    return {run.info.run_name: run for run in evaluated}


@pytest.fixture(scope="module")
def students(runs: dict[str, Run]) -> list[Run]:
    return [runs["student_distilled/seed0"], runs["student_alone/seed0"]]


@pytest.fixture(scope="module")
def address(store: str) -> Iterator[str]:
    """What `make ui` prints: the address of the table of results, in the UI that it has started."""
    port = free_port()
    folder = {} if SCREENSHOTS else {"DVC_ROOT": str(Path(store.removeprefix("sqlite:///")).parent)}
    environment = (
        os.environ | folder | {"PORT": str(port), "MLFLOW_TRACKING_URI": store, "BROWSER": "true", "MLFLOW_WORKERS": "1"}
    )
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


@pytest.fixture(scope="module")
def new_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile"), "window-size=1720,1000") as browser:
        yield browser


@pytest.fixture
def browser(new_browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    """With the assistant closed that the UI opens for a new visitor."""
    new_browser.get(address)
    if new_browser.find_elements(By.XPATH, CLOSE):
        click(new_browser, CLOSE)
    return new_browser


def wait_until(browser: webdriver.Chrome, seen: Callable[[], Any], what: str) -> Any:
    """What `seen` returns once it is something. Raises TimeoutException that says `what` was not seen."""
    ignored = [NoSuchElementException, StaleElementReferenceException, ElementNotInteractableException]
    return WebDriverWait(browser, 60, ignored_exceptions=ignored).until(lambda _: seen(), f"not seen: {what}")


def click(browser: webdriver.Chrome, xpath: str) -> None:
    wait_until(browser, lambda: [browser.find_element(By.XPATH, xpath).click()], xpath)


def open_comparison(browser: webdriver.Chrome, address: str, pair: list[Run]) -> None:
    ids, experiments = json.dumps([run.info.run_id for run in pair]), json.dumps([pair[0].info.experiment_id])
    browser.get(f"{address.partition('/experiments/')[0]}/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}")
    browser.refresh()  # of an address that differs after the # alone the page takes no notice, now and then
    wait_until(browser, lambda: browser.find_element(By.XPATH, "//*[contains(., 'Comparing 2 Runs')]"), "the comparison")


def test_make_ui_opens_the_table_of_results_which_answers_without_a_click(
    new_browser: webdriver.Chrome, address: str, runs: dict[str, Run]
):
    """A row for each model and setting, the most accurate first; what was varied stands in its name."""
    new_browser.get(address)
    models = [run for run in runs.values() if "/seed" not in run.info.run_name]

    def rows() -> list[list[str]]:
        shown = []
        for run in sorted(models, key=lambda run: run.data.metrics["test_accuracy"], reverse=True):
            link = new_browser.find_element(By.XPATH, f"//a[contains(@href, '/runs/{run.info.run_id}')]")
            row = link.find_element(By.XPATH, "./ancestor::*[@row-id]").get_attribute("row-id")
            cells = [f"//*[@row-id='{row}']//*[contains(@col-id, '`{column}`')]" for column in COLUMNS]
            shown.append([link.location["y"], link.text, *(new_browser.find_element(By.XPATH, cell).text for cell in cells)])
        return shown

    places, *_ = zip(*(shown := wait_until(new_browser, rows, "a row for each model")), strict=True)
    assert list(places) == sorted(places)
    empty = dict.fromkeys(COLUMNS, "-")
    tags = {run.info.run_name: empty | run.data.tags for run in models}
    assert {name: cells for _, name, *cells in shown} == {name: [of[column] for column in COLUMNS] for name, of in tags.items()}
    if not SCREENSHOTS:
        gains = [tags[f"student_distilled{varied}"]["gain"] for varied in ("", " T=6")]
        assert all(re.fullmatch(r"[+-]\d+\.\d\d \([+-]\S+ to [+-]\S+\) over student_alone", gain) for gain in gains)
        assert gains[0] != gains[1]
    if SCREENSHOTS:
        click(new_browser, CLOSE)
        auc = "//*[@role='columnheader' and contains(@col-id, '`auc`')]"
        wait_until(new_browser, lambda: new_browser.find_element(By.XPATH, auc), "the column for which there is room then")
        page = Image.open(io.BytesIO(new_browser.get_screenshot_as_png())).convert("RGB")
        cropped = page.crop((195, 0, page.width, 510))
        cropped.quantize(256).save(Path(SCREENSHOTS) / "mlflow-results.png", optimize=True)


def test_from_the_comparison_of_two_students_a_click_leads_to_both_loss_curves(
    browser: webdriver.Chrome, address: str, store: str, students: list[Run]
):
    open_comparison(browser, address, students)
    table = "//a[@title='Plot chart']/following::*[contains(@class, 'ReactVirtualized__Grid')]"

    def link() -> WebElement | None:
        if links := browser.find_elements(By.LINK_TEXT, "train_loss"):
            return links[0]
        metrics = browser.find_element(By.XPATH, table)  # it has only those rows that are in view
        browser.execute_script("arguments[0].scrollTop += 150", metrics)
        return None

    wait_until(browser, link, "train_loss in the table of metrics")
    click(browser, "//a[.='train_loss']")

    def curves() -> dict[str, list[float]] | None:
        """What the chart draws, as soon as it has a line for each run."""
        chart = browser.find_element(By.CSS_SELECTOR, ".js-plotly-plot")
        lines = {path.get_attribute("d") for path in chart.find_elements(By.CSS_SELECTOR, "path.js-line")}
        if len([line for line in lines if "L" in line]) < 2:
            return None
        return dict(browser.execute_script("return arguments[0].data.map(({name, y}) => [name, [...y]])", chart))

    shown = wait_until(browser, curves, "two loss curves")
    client = MlflowClient(store)
    histories = {run.info.run_name: client.get_metric_history(run.info.run_id, "train_loss") for run in students}
    assert shown == {name: [metric.value for metric in history] for name, history in histories.items()}
    for name in histories:
        legend = f"//*[.='{name} (train_loss)']"
        wait_until(browser, lambda xpath=legend: browser.find_element(By.XPATH, xpath).is_displayed(), legend)


def test_the_comparison_of_two_students_shows_both_confusion_matrices(
    browser: webdriver.Chrome, address: str, students: list[Run]
):
    open_comparison(browser, address, students)
    click(browser, "//*[@artifact-name='confusion_matrix.png']")

    def matrices() -> list[WebElement] | None:
        images = browser.find_elements(By.CSS_SELECTOR, "img[alt='confusion_matrix.png']")
        loaded = [image for image in images if image.is_displayed() and int(image.get_property("naturalWidth")) > 0]
        return loaded if len(loaded) == len(students) else None

    wait_until(browser, matrices, "two images of confusion matrices")
