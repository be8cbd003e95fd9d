"""The page of `make try` in a real browser answers as pipeline.serving.predict, and asks no other host for anything."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.core.errors import UserError
from pipeline.data.prepared import TrainingData
from pipeline.export.onnx_export import export_onnx
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import new_classifier
from pipeline.serving.predict import PUBLISHED, read_image
from pipeline.serving.try_student import DOWNLOADS, PACKAGE, handler, read_runtime
from tests.browser import needs_browser, open_browser
from tests.checkout import free_port
from tests.conftest import ROOT
from tests.networks.conftest import ARGUMENTS
from tests.serving.conftest import running

COMMAND = [sys.executable, "-m", "pipeline.serving.try_student"]
HOSTILE = "<img src=x onerror=document.title='run'>"
SIZES = [(28, 28), (29, 28), (300, 500), (611, 333), (13, 17), (3, 400), (1, 1)]  # heights and widths
EXIF = Image.Exif()
EXIF[0x112] = 6  # orientation: to be turned by 90 degrees


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One that can be shown the page: skips without ONNX Runtime Web and npm, or a registry, to fetch it."""
    try:
        read_runtime(DOWNLOADS)
    except UserError as error:
        if "damaged" in str(error):
            raise
        pytest.skip(str(error))
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of many sizes and kinds that the page reads."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for height, width in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"colour {height}x{width}.png")
        image.convert("L").save(folder / f"grey {height}x{width}.png")
    image = Image.open(folder / "colour 300x500.png")
    image.save(folder / "turned.png", exif=EXIF)
    image.save(folder / "turned.jpg", exif=EXIF)
    image.convert("L").save(folder / "grey.jpg")
    image.quantize(7).save(folder / "palette.png")
    return sorted(folder.iterdir())


@contextlib.contextmanager
def shown(browser: webdriver.Chrome, *command: str, **options: object) -> Iterator[str]:
    """Show the page of a server that this command starts, until the block ends; its address."""
    port = free_port()
    with running(port, *command, cwd=ROOT, env=os.environ | {"PORT": str(port)}, **options):
        browser.get(address := f"http://127.0.0.1:{port}/")
        WebDriverWait(browser, 120).until(lambda _: browser.find_element(By.ID, "file").is_enabled())
        yield address


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).get_property("textContent")


def drop(browser: webdriver.Chrome, path: Path) -> str:
    """What the page says of a file that is dropped onto it, without the times."""
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 9, "y": 9, "data": data})
    return answer(browser, path)


def answer(browser: webdriver.Chrome, path: Path) -> str:
    WebDriverWait(browser, 60).until(lambda _: text(browser, "answer").startswith(f"{path.name}: "))
    return text(browser, "answer").removeprefix(f"{path.name}: ").partition(" (computed in ")[0]


def probabilities(browser: webdriver.Chrome) -> list[float]:
    return [float(element.get_attribute("value")) for element in browser.find_elements(By.TAG_NAME, "data")]


def seen(browser: webdriver.Chrome, student: Student) -> np.ndarray:
    """The pixels that the page has given to the student, and shows."""
    script = "const c = document.getElementById('seen'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height);"
    height, width, channels = student.shape
    return np.array(browser.execute_script(f"{script} return [...d.data]"), np.uint8).reshape(height, width, 4)[..., :channels]


def requested(browser: webdriver.Chrome) -> set[str]:
    """The addresses of all requests since the last call, but those of the browser's own pages."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return {address for address in sent if not address.startswith(("chrome://", "data:"))}


def check_answers(browser: webdriver.Chrome, student: Student, images: list[Path]) -> None:
    for path in images:
        pixels = read_image(path, student.shape, student.resize)
        (expected,) = student.probabilities(pixels[None])
        assert drop(browser, path) == student.classes[expected.argmax()]
        np.testing.assert_allclose(probabilities(browser), expected, atol=1e-4, err_msg=path.name)
        if path.suffix == ".png":  # JPEG's decoders may differ
            np.testing.assert_array_equal(seen(browser, student), pixels, path.name)


@needs_browser
def test_a_dropped_image_gets_the_answer_of_predict_and_no_request_goes_to_another_host(
    browser: webdriver.Chrome, images: list[Path], tmp_path: Path
):
    student = Student(PUBLISHED / "baselines.onnx")
    requested(browser)
    with (tmp_path / "printed").open("w") as printed, shown(browser, *COMMAND, stdout=printed) as address:
        assert (tmp_path / "printed").read_text() == f"baselines.onnx on {address}\n"
        assert "normal, pneumonia" in text(browser, "about")
        check_answers(browser, student, images)
        browser.find_element(By.ID, "file").send_keys(str(images[0]))
        assert answer(browser, images[0]) in student.classes
        loaded = {address + name for name in ("", "try_student.js", "student.json", "student.onnx", "ort.mjs", "ort.wasm")}
        assert requested(browser) == loaded
        refused = "document.addEventListener('securitypolicyviolation', (event) => arguments[0](event.effectiveDirective));"
        assert browser.execute_async_script(f"{refused} fetch('http://127.0.0.1:9/').catch(() => 0)") == "connect-src"
        assert requests.get(address, headers={"Host": "evil.example"}, timeout=60).status_code == 404
        assert requests.get(f"{address}../Makefile", timeout=60).status_code == 404
        port = address.strip("/").rpartition(":")[2]
        second = subprocess.run(COMMAND, cwd=ROOT, env=os.environ | {"PORT": port}, capture_output=True, text=True, check=False)
        (line,) = second.stderr.splitlines()
        assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")


@needs_browser
@pytest.mark.slow  # the test above is of one rule
@pytest.mark.parametrize(
    ("shape", "rule"), [((20, 28, 3), "pad"), ((28, 20, 1), "pad"), ((20, 28, 3), "stretch"), ((28, 28, 1), None)]
)
def test_every_rule_of_resizing_and_names_that_are_markup(
    browser: webdriver.Chrome, images: list[Path], data: TrainingData, tmp_path: Path, shape: tuple, rule: str | None
):
    dataset = data.dataset.model_copy(update={"image_shape": shape, "classes": [HOSTILE, *data.dataset.classes[1:]]})
    classifier = new_classifier("compact_cnn", ARGUMENTS, dataset, 0).eval()
    export_onnx(classifier, shape, dataset.classes, tmp_path / "foreign.onnx", rule)
    student = Student(tmp_path / "foreign.onnx")
    code = "from pathlib import Path; from pipeline.serving import try_student as page; "
    code += f"page.PUBLISHED = Path({str(tmp_path)!r}); page.main('foreign')"
    with shown(browser, sys.executable, "-c", code):
        assert HOSTILE in text(browser, "about")
        if not rule:
            other = [path for path in images if "28x28" not in path.name]
            images = [path for path in images if path not in other]
            assert all("28x28 are wanted" in drop(browser, path) for path in other)
        check_answers(browser, student, images)
        assert HOSTILE in text(browser, "probabilities")
        assert (browser.find_elements(By.TAG_NAME, "img"), browser.title) == ([], "Try the student")


def write_refused(folder: Path) -> None:
    """Files that the page does not read, nor predict, but for those whose name says so."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8))
    for name, mode in {"alpha.png": "RGBA", "grey alpha.png": "LA", "1 bit.png": "1", "print.jpg": "CMYK", "a.gif": "P"}.items():
        image.convert(mode).save(folder / name)
    Image.fromarray(np.full((28, 28), 700, np.uint16)).save(folder / "16 bits.png")
    image.quantize(8).save(folder / "transparent.png", transparency=3)
    for name in ("torn.png", "torn.jpg"):
        image.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:700])
    image.save(folder / "animated.png", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "turned, predict reads.jpg", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    image.save(folder / "predict reads.tif")
    (folder / "empty.png").touch()
    (folder / "header.jpg").write_bytes((folder / "torn.jpg").read_bytes()[:50])


@needs_browser
def test_what_predict_refuses_the_page_refuses_and_some_more(browser: webdriver.Chrome, tmp_path: Path):
    write_refused(tmp_path)
    Image.new("L", (28, 28)).save(tmp_path.parent / "good.png")
    with shown(browser, *COMMAND, "distillation"):
        for path in sorted(tmp_path.iterdir()):
            with contextlib.nullcontext() if "predict reads" in path.stem else pytest.raises(UserError):
                read_image(path, (28, 28, 1), "crop")
            assert "cannot be read as an image: " in drop(browser, path), path.name
            assert not browser.find_element(By.ID, "result").is_displayed()
        assert drop(browser, tmp_path.parent / "good.png") in map(str, range(10))


def test_a_browser_that_goes_away_in_the_middle_is_not_worth_a_traceback(capfd: pytest.CaptureFixture):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler({"/": ("text/plain", bytes(10**8))}, {"localhost"})) as server:
        threading.Thread(target=server.serve_forever).start()
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.recv(1000)
        server.shutdown()
    assert capfd.readouterr().err == ""


def test_without_npm_or_with_other_bytes_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"\.tgz is missing, and npm to fetch it: .*: install Node.js"):
        read_runtime(tmp_path / "new")
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(UserError, match=r"npm did not fetch onnxruntime-web@.*: npm error code ENOTFOUND"):
        read_runtime(tmp_path)
    (tmp_path / f"{PACKAGE.replace('@', '-')}.tgz").write_bytes(b"another")
    with pytest.raises(UserError, match=r"damaged, or not the onnxruntime-web@.* that is wanted: delete it"):
        read_runtime(tmp_path)
