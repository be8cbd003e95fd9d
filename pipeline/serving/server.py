"""Serve the champion of the registry: `make serve` (PORT=5001, SERVE_HOST=127.0.0.1).

POST {"inputs": images} as JSON to /invocations, as to MLflow's own model server: whole numbers from 0 to 255 of shape
(N, H, W, C). The answer is {"predictions": [{"class": name, "probabilities": {name: share}}]}, one per image; GET /ping says that
the server lives. Only the ONNX file that was registered is opened: no code from the store is run. Bodies over 4 MiB are refused.
"""

import asyncio
import json
import os
import re
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.core.cli import read_port, run
from pipeline.core.errors import user_error
from pipeline.export.onnx_model import Student
from pipeline.params import TRACKS
from pipeline.serving.registry import NAMES, open_champion, open_store

LIMIT = 4 * 2**20  # bytes of a request's body
PATIENCE = 30  # seconds for it to come, and for a connection to begin a request
MOST = 64  # connections at a time: others get a 503
FORM = re.compile(rb'\s*{\s*"(inputs|instances)"\s*:[-+\d.eE,\[\]\s]*}\s*')  # the second is what TensorFlow's servers read


def application(student: Student, hosts: Sequence[str] = ("*",)) -> Starlette:
    """The server's ASGI application: 413 for too large a body, 408 for a slow one, 400 for other JSON than above.

    Requests for another host than those in `hosts` get a 400 too: a web page elsewhere could otherwise reach a local server by a
    name of its own (DNS rebinding).
    """

    async def invocations(request: Request) -> Response:
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in request.stream():
                    size += len(part)
                    body.extend(part) if size <= LIMIT else body.clear()
        except TimeoutError:
            if size <= LIMIT:
                return PlainTextResponse(f"the body did not come within {PATIENCE} s", 408)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        if size > LIMIT:
            return PlainTextResponse(f"the body is over the limit of {LIMIT} bytes", 413)
        return await run_in_threadpool(_answer, student, bytes(body))

    ping = Route("/ping", lambda request: Response())
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return Starlette(routes=[Route("/invocations", invocations, methods=["POST"]), ping], middleware=[guard])


def _answer(student: Student, body: bytes) -> Response:
    try:
        images = read_images(body, student.shape)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # Among them numbers of thousands of digits, and brackets by the thousand.
        shape = f"(N, {', '.join(map(str, student.shape))})"
        form = f'{{"inputs": whole numbers from 0 to 255 of shape {shape}}}'
        return PlainTextResponse(f"the body is no JSON of the form {form}: {str(error)[:200]}", 400)
    rows = [dict(zip(student.classes, row.tolist(), strict=True)) for row in student.probabilities(images)]
    return JSONResponse({"predictions": [{"class": max(row, key=row.get), "probabilities": row} for row in rows]})


def read_images(body: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The images in a request's body, uint8 (N, *shape). Raises ValueError, or what JSON and NumPy raise, for anything else."""
    if not FORM.fullmatch(body):  # NumPy would take true and "12" for numbers
        raise ValueError("one key, inputs, and numbers in brackets are wanted")
    (numbers,) = json.loads(body).values()
    images = np.array(numbers, dtype=np.float64)
    if images.shape[1:] != shape or not len(images):
        raise ValueError(f"these have shape {images.shape}")
    # Scaled images (0-1) would otherwise all be black.
    if not ((images >= 0) & (images <= 255) & (images == np.floor(images))).all():
        raise ValueError(f"these are from {images.min()} to {images.max()}")
    return images.astype(np.uint8)


class Protocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which nothing is going on: uvicorn waits forever, for a request or for its reader."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """As h11's, and look after the connection."""
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self._look, None)

    def _look(self, unread: object) -> None:
        """`unread`: the request whose answer nobody took when this was last called."""
        if self.transport.is_closing() or (unread and unread is self.cycle):
            self.transport.abort()
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()  # when what is written is read
        self.loop.call_later(PATIENCE, self._look, self.cycle if self.flow.write_paused else None)


def main(track: str = "distillation") -> None:
    """Serve the champion of a track until interrupted."""
    with tempfile.TemporaryDirectory() as folder:
        version, student = open_champion(open_store(), track, Path(folder))
    host, port = os.environ.get("SERVE_HOST") or "127.0.0.1", read_port(os.environ.get("PORT") or "5001")
    hosts = ("127.0.0.1", "localhost") if host in ("127.0.0.1", "localhost") else ("*",)
    with user_error(f"cannot listen on {host}:{port}", OSError, then="PORT=... (make serve SERVE_PORT=...) names another port"):
        listening = socket.create_server((host, port))
    print(f"{NAMES[track]} version {version} on http://{host}:{port}/invocations", flush=True)
    options = {"http": Protocol, "log_level": "warning", "limit_concurrency": MOST}
    uvicorn.Server(uvicorn.Config(application(student, hosts), **options)).run([listening])


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
