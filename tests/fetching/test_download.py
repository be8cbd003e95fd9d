"""Downloads from a real server that misbehaves."""

import hashlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.fetching import download as module
from pipeline.fetching.download import Checksum, download
from tests.conftest import ROOT

CONTENT = bytes(range(256)) * 4000  # 1 MB
DROP = 4 * module.CHUNK  # bytes after which a connection breaks


class Host(http.server.BaseHTTPRequestHandler):
    """Serves `content`; what goes wrong is the head of `faults`, one for each request, and nothing once they are used up."""

    content = CONTENT
    faults: tuple[str, ...] = ()
    ranges = True
    delay = 0.0
    asked: tuple[str, ...] = ()  # the Range header of each request, "" where there was none

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked += (self.headers.get("Range", ""),)
        fault, kind.faults = (kind.faults[0], kind.faults[1:]) if kind.faults else ("", kind.faults)
        if fault == "silent":
            time.sleep(2)
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        body = b"x" * len(self.content) if fault == "wrong" else self.content
        start = 0
        if self.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        time.sleep(self.delay)
        self.wfile.write(body[start : start + DROP] if fault.startswith("drop") else body[start:])
        if fault == "drop and change":
            kind.content = CONTENT[::-1]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Host], str]]:
    """A host that a test tells how to misbehave, and the address of its file. No attempt waits."""
    monkeypatch.setattr(module, "WAITS", (0,) * len(module.WAITS))
    kind = type("OneHost", (Host,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield kind, f"http://127.0.0.1:{running.server_port}/file"
        running.shutdown()


def md5(content: bytes) -> Checksum:
    return Checksum("md5", hashlib.md5(content).hexdigest())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".a.lock"}


@pytest.mark.parametrize(
    ("faults", "ranges", "asked"),
    [
        ((), True, ("",)),
        (("500", "503"), True, ("",) * 3),
        (("429",), True, ("",) * 2),
        (("drop", "drop"), True, ("", f"bytes={DROP}-", f"bytes={2 * DROP}-")),
        (("drop",), False, ("", f"bytes={DROP}-")),
        (("drop", "502"), True, ("", f"bytes={DROP}-", f"bytes={DROP}-")),
    ],
)
def test_a_download_survives_passing_faults(tmp_path: Path, host, faults, ranges: bool, asked: tuple[str, ...]):
    kind, url = host
    kind.faults, kind.ranges = faults, ranges
    download([url], tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert kind.asked == asked
    assert names(tmp_path) == {"a"}


def test_a_file_that_changed_after_the_break_starts_over(tmp_path: Path, host):
    kind, url = host
    kind.faults = ("drop and change",)
    download([url], tmp_path / "a", md5(CONTENT[::-1]))
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]
    assert kind.asked == ("", f"bytes={DROP}-", "")
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("partial", [CONTENT[:1000], CONTENT, b"y" * 1000, CONTENT + b"y"])
def test_a_later_call_resumes_an_earlier_one(tmp_path: Path, host, partial: bytes):
    kind, url = host
    (tmp_path / ".a.partial").write_bytes(partial)
    download([url], tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT
    damaged = not CONTENT.startswith(partial)
    assert kind.asked == (f"bytes={len(partial)}-", "")[: 1 + damaged]
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [
        (("404",), 1, "404"),
        (("403",), 1, "403"),
        (("wrong",), 1, "serves another file: wrong checksum: md5 is"),
        (("500",) * 9, 5, "5 attempts, the last.*500"),
        (("silent",) * 9, 5, "5 attempts, the last.*timed out"),
        (("drop",) * 3 + ("404",), 4, "404"),
    ],
)
def test_a_lasting_fault_is_one_error_and_no_file(
    tmp_path: Path, host, monkeypatch: pytest.MonkeyPatch, faults, requests: int, message: str
):
    kind, url = host
    kind.faults = faults
    monkeypatch.setattr(module, "SILENCE", 0.2)
    with pytest.raises(ConnectionError, match=message):
        download([url], tmp_path / "a", md5(CONTENT))
    assert len(kind.asked) == requests
    assert not (tmp_path / "a").exists()


def test_another_place_is_asked_where_one_refuses(tmp_path: Path, host):
    kind, url = host
    kind.faults = ("404",)
    download([url, f"{url}?mirror"], tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_attempts_are_few_and_wait_longer_each_time():
    assert 3 <= len(module.WAITS) <= 6
    assert list(module.WAITS) == sorted(set(module.WAITS))
    assert sum(module.WAITS) <= 30


PROCESS = """
import sys
from pathlib import Path
from pipeline.fetching.download import Checksum, download
download([sys.argv[1]], Path(sys.argv[2]), Checksum("md5", sys.argv[3]))
print(Path(sys.argv[2]).stat().st_size)
"""


def test_two_processes_at_once_download_once_and_both_get_the_file(tmp_path: Path, host):
    kind, url = host
    kind.delay = 1.5  # both have asked for the lock by then
    command = [sys.executable, "-c", PROCESS, url, str(tmp_path / "a"), md5(CONTENT).digest]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].split() for process in processes] == [[b"%d" % len(CONTENT)]] * 2
    assert kind.asked == ("",)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_the_download_of_a_killed_process_is_resumed(tmp_path: Path, host):
    kind, url = host
    kind.content = CONTENT * 100
    command = [sys.executable, "-c", PROCESS, url, str(tmp_path / "a"), md5(kind.content).digest]
    process = subprocess.Popen(command, cwd=ROOT)
    partial = tmp_path / ".a.partial"
    while not (partial.is_file() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "a").exists()
    download([url], tmp_path / "a", md5(kind.content))
    assert kind.asked[1].startswith("bytes=")
    assert (tmp_path / "a").read_bytes() == kind.content
