"""A real web server that misbehaves as told."""

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.fetching import download

DROP = 4 * download.CHUNK  # bytes after which a connection breaks


class Host(http.server.ThreadingHTTPServer):
    """Serves `files`; what goes wrong is the head of `faults`, one for each request, and nothing once they are used up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ranges, self.delay = True, 0.0
        self.asked: list[str] = []  # the Range header of each request, "" where there was none


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        host, name = self.server, self.path[1:]
        host.asked.append(self.headers.get("Range", ""))
        fault = host.faults.pop(0) if host.faults else "" if name in host.files else "404"
        start = int(host.asked[-1].strip("bytes=-") or 0) if host.ranges else 0
        body = host.files.get(name, b"")
        if fault == "silent":
            time.sleep(2)
        elif fault.isdigit() or start >= len(body):
            self.send_error(int(fault or 416))
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            time.sleep(host.delay)
            sent = body[start : start + DROP] if fault.startswith("drop") else body[start:]
            self.wfile.write(sent if fault != "wrong" else b"x" * len(sent))
            if fault == "drop and change":
                host.files[name] = body[::-1]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host of one's own. No attempt waits."""
    monkeypatch.setattr(download, "WAITS", (0,) * len(download.WAITS))
    monkeypatch.setattr(download, "SILENCE", 0.5)
    with Host() as host:
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        yield host
        host.shutdown()
