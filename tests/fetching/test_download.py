import hashlib
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.fetching.download import Checksum, download
from tests.conftest import ROOT
from tests.fetching.conftest import DROP, Host

CONTENT = bytes(range(256)) * 4000  # 1 MB
SIZE = len(CONTENT)


def md5(content: bytes) -> Checksum:
    return Checksum("md5", hashlib.md5(content).hexdigest())


@pytest.mark.parametrize(
    ("faults", "ranges", "partial", "asked"),
    [
        ([], True, b"", [""]),
        (["500", "503"], True, b"", ["", "", ""]),
        (["429"], True, b"", ["", ""]),
        (["drop", "drop"], True, b"", ["", f"bytes={DROP}-", f"bytes={2 * DROP}-"]),
        (["drop"], False, b"", ["", f"bytes={DROP}-"]),
        (["drop", "502"], True, b"", ["", f"bytes={DROP}-", f"bytes={DROP}-"]),
        (["drop and change"], True, b"", ["", f"bytes={DROP}-", ""]),
        ([], True, CONTENT[:1000], ["bytes=1000-"]),
        ([], True, CONTENT, [f"bytes={SIZE}-"]),
        ([], True, b"y" * 1000, ["bytes=1000-", ""]),
        ([], True, CONTENT + b"y", [f"bytes={SIZE + 1}-", ""]),
    ],
    ids=itertools.count(),
)
def test_a_download_survives_passing_faults_and_resumes_what_is_there(
    tmp_path: Path, host: Host, faults: list[str], ranges: bool, partial: bytes, asked: list[str]
):
    content = CONTENT[::-1] if "drop and change" in faults else CONTENT
    host.files["a"], host.faults, host.ranges = CONTENT, faults.copy(), ranges
    if partial:
        (tmp_path / ".a.partial").write_bytes(partial)
    download([f"{host.address}/a"], tmp_path / "a", md5(content))
    assert (tmp_path / "a").read_bytes() == content
    assert host.asked == asked
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.lock"}


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [
        (["404"], 1, "404"),
        (["403"], 1, "403"),
        (["wrong"], 1, "serves another file: wrong checksum: md5 is"),
        (["500"] * 9, 5, "5 attempts, the last.*500"),
        (["silent"] * 9, 5, "5 attempts, the last.*timed out"),
        (["drop"] * 3 + ["404"], 4, "404"),
    ],
)
def test_a_lasting_fault_is_one_error_and_no_file(tmp_path: Path, host: Host, faults: list[str], requests: int, message: str):
    host.files["a"], host.faults = CONTENT, faults.copy()
    with pytest.raises(ConnectionError, match=message):
        download([f"{host.address}/a"], tmp_path / "a", md5(CONTENT))
    assert len(host.asked) == requests
    assert not (tmp_path / "a").exists()


def test_another_place_is_asked_where_one_refuses(tmp_path: Path, host: Host):
    host.files["a"] = CONTENT
    download([f"{host.address}/none", f"{host.address}/a"], tmp_path / "a", md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


PROCESS = """
import sys
from pathlib import Path
from pipeline.fetching.download import Checksum, download
download([sys.argv[1]], Path(sys.argv[2]), Checksum("md5", sys.argv[3]))
"""


def start(host: Host, content: bytes, path: Path) -> subprocess.Popen:
    host.files["a"] = content
    return subprocess.Popen([sys.executable, "-c", PROCESS, f"{host.address}/a", str(path), md5(content).digest], cwd=ROOT)


def test_two_processes_at_once_download_once_and_both_get_the_file(tmp_path: Path, host: Host):
    host.delay = 1.5  # both have asked for the lock by then
    processes = [start(host, CONTENT, tmp_path / "a") for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert host.asked == [""]
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_the_download_of_a_killed_process_is_resumed(tmp_path: Path, host: Host):
    content, partial = CONTENT * 100, tmp_path / ".a.partial"
    process = start(host, content, tmp_path / "a")
    while not (partial.is_file() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "a").exists()
    download([f"{host.address}/a"], tmp_path / "a", md5(content))
    assert host.asked[1].startswith("bytes=")
    assert (tmp_path / "a").read_bytes() == content
