"""The pages of the MLflow UI in a real browser, on the way of a user who asks whether distilling the student was worth it.

With SCREENSHOTS=<folder>, the pages are those of this checkout's own store instead of a small run's, and the pictures that
README.md shows are written to the folder.
"""

import io
import json
import os
import shutil
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
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.core.tracking_uri import tracking_uri
from pipeline.tracking.mirror import Mirror
from tests.faults.checkout import free_port, wait_for
from tests.tracking.samples import make_evaluation, make_record

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SCREENSHOTS = os.environ.get("SCREENSHOTS")
COLUMNS = ("accuracy", "gain", "verdict")
SHARES = {
    "baselines": {"simple_cnn": 0.7, "resnet18": 0.9},
    "distillation": {"teacher": 0.95, "student_distilled": 0.9, "student_alone": 0.85},
}
MODELS = [model for shares in SHARES.values() for model in shares]

pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
    pytest.mark.slow,  # tests/reporting opens the report in Chromium
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, new_store: bytes) -> str:
    """The address of a store with two seeds of every model, trained and evaluated."""
    if SCREENSHOTS:
        return tracking_uri()
    folder = tmp_path_factory.mktemp("main")
    (folder / "mlflow.db").write_bytes(new_store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mirror = Mirror("e")
        for track, shares in SHARES.items():
            for record in (make_record(seed, model=model) for model in shares for seed in (0, 1)):
                mirror.training(record)
            mirror.evaluation(make_evaluation(make_record(0), make_record(1), track=track, shares=shares))
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
def address(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The UI of the store."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1", "--backend-store-uri", store]
    server = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("ui"), start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        yield f"http://127.0.0.1:{port}/#"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Chromium, with the assistant closed that the UI opens for a new visitor."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic", "no-first-run")
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in ("headless", "no-sandbox", "disable-gpu", "window-size=1400,1000", *quiet, profile):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as browser:
        browser.get(address)
        click(browser, "//*[@data-component-id='mlflow.assistant.chat_panel.close']")
        yield browser


def wait_until(browser: webdriver.Chrome, seen: Callable[[], Any], what: str) -> Any:
    """What `seen` returns once it is something. Raises TimeoutException that says `what` was not seen."""
    ignored = [NoSuchElementException, StaleElementReferenceException, ElementNotInteractableException]
    return WebDriverWait(browser, 60, ignored_exceptions=ignored).until(lambda _: seen(), f"not seen: {what}")


def click(browser: webdriver.Chrome, xpath: str) -> None:
    wait_until(browser, lambda: [browser.find_element(By.XPATH, xpath).click()], xpath)


def open_comparison(browser: webdriver.Chrome, address: str, pair: list[Run]) -> None:
    ids, experiments = json.dumps([run.info.run_id for run in pair]), json.dumps([pair[0].info.experiment_id])
    browser.get(f"{address}/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}")
    wait_until(browser, lambda: browser.find_element(By.XPATH, "//*[contains(., 'Comparing 2 Runs')]"), "the comparison")


def take_picture(browser: webdriver.Chrome, name: str, bottom: int) -> None:
    """Of what the window shows right of the navigation, down to a row of pixels, if pictures are wanted."""
    if SCREENSHOTS:
        page = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        cropped = page.crop((195, 0, page.width, bottom))
        cropped.quantize(256).save(Path(SCREENSHOTS) / f"mlflow-{name}.png", optimize=True)


def test_the_table_of_runs_answers_whether_distilling_the_student_was_worth_it(
    browser: webdriver.Chrome, address: str, runs: dict[str, Run]
):
    """A row for each model; its seeds are folded away."""
    browser.get(f"{address}/experiments/{runs['teacher'].info.experiment_id}/runs?workflowType=machine_learning")
    click(browser, "//button[contains(., 'Columns')]")
    for column in ("Dataset", "Source", "Models"):
        click(browser, f"//*[@title='{column}']")
    search = browser.find_element(By.XPATH, "//input[@placeholder='Search columns']")

    def tick(column: str) -> bool:
        if titles := browser.find_elements(By.XPATH, f"//*[contains(@class, 'tree-title') and .='{column}']"):
            titles[0].click()
        else:  # the list of tags is folded
            unfold = "//*[starts-with(@title, 'Tags (')]/preceding-sibling::*[contains(@class, 'switcher')]"
            browser.find_element(By.XPATH, unfold).click()
        return bool(titles)

    for column in COLUMNS:
        search.send_keys(Keys.CONTROL, "a")
        search.send_keys(column)
        wait_until(browser, lambda column=column: tick(column), f"{column} among the columns to choose from")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)

    def rows() -> dict[str, list[str]]:
        shown = {}
        for model in MODELS:
            link = browser.find_element(By.XPATH, f"//a[contains(@href, '/runs/{runs[model].info.run_id}')]")
            row = link.find_element(By.XPATH, "./ancestor::*[@row-id]").get_attribute("row-id")
            cells = [f"//*[@row-id='{row}']//*[contains(@col-id, '`{column}`')]" for column in COLUMNS]
            shown[link.text] = [browser.find_element(By.XPATH, cell).text for cell in cells]
        return shown

    shown = wait_until(browser, rows, "a row for each of the five models")
    empty = dict.fromkeys(COLUMNS, "-")
    assert shown == {model: [(empty | runs[model].data.tags)[column] for column in COLUMNS] for model in MODELS}
    take_picture(browser, "runs", bottom=640)


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
    take_picture(browser, "losses", bottom=690)


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
    heading = browser.find_element(By.XPATH, "//*[@role='button'][.='Artifacts']")
    browser.execute_script("arguments[0].scrollIntoView()", heading)
    take_picture(browser, "confusion", bottom=570)
