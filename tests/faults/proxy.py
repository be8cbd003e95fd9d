"""An HTTP proxy on 127.0.0.1 in front of a server, with outages to switch on."""

import http.client
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

FAULTS = ("refused", "reset", "answer lost", "hanging", "HTTP 500", "slow")
SLOW = 3  # seconds per request


class Proxy:
    """Passes requests on to the port `upstream`, except while there is a fault. A context: closed at its end."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.fault: str | None = None
        self._listen(0)
        self.port = self._server.server_port

    def _listen(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def begin(self, fault: str) -> None:
        """Be out of order in one of the ways in FAULTS."""
        self.fault = fault
        if fault == "refused":
            self._close()

    def end(self) -> None:
        """Work again."""
        if self.fault == "refused":
            self._listen(self.port)
        self.fault = None

    def _close(self) -> None:
        self._server.shutdown()
        self._server.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        proxy: Proxy = self.server.proxy
        fault = proxy.fault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "hanging":
            while proxy.fault == fault:
                time.sleep(0.05)
        if fault in ("refused", "reset", "hanging"):
            return self._cut()
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "HTTP 500":
            return self._answer(500, {}, b"out of order")
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers.items()) | {"Connection": "close"})
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "answer lost":  # the request is carried out all the same
            return self._cut()
        return self._answer(answer.status, {"Content-Type": answer.getheader("Content-Type", "text/plain")}, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815 (http.server's names)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _cut(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""
