"""Serve the champion with MLflow's model server, on 127.0.0.1: `make serve` (PORT=5001, HOST=127.0.0.1).

POST images as JSON to /invocations; see README.md. Bodies over 4 MiB are refused and not kept.
"""

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import mlflow
import numpy as np
import uvicorn
from mlflow.pyfunc import scoring_server

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.params import load_params
from pipeline.serving.registry import CHAMPION, NAME, by_alias
from pipeline.tracking.store import Store

LIMIT = 4 * 2**20  # bytes of a request's body
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class GuardBody:
    """ASGI middleware that lets nothing but images through to the app, which would take minutes and gigabytes to refuse it.

    413 for a body over the limit, which is not kept, 415 for another type than JSON, 400 for JSON that is not `inputs` (or
    `instances`, as TensorFlow's servers name them) of numbers of shape (N, *shape).
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int, shape: tuple[int, ...]) -> None:
        self.app = app
        self.limit = limit
        self.shape = shape

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Read the body and hand it on if it is well."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limit:
                parts.clear()
            more = message.get("more_body", False)
        body = b"".join(parts)
        posted = scope["method"] == "POST"
        if size > self.limit:
            await _answer(send, 413, f"the body is over the limit of {self.limit} bytes")
        elif posted and dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0] != b"application/json":
            await _answer(send, 415, "only application/json is read")  # MLflow would also unpack parquet, of any size
        elif posted and _shape(body)[1:] != self.shape:
            wanted = f"(N, {', '.join(map(str, self.shape))})"
            await _answer(send, 400, f'the body is no JSON of the form {{"inputs": numbers of shape {wanted}}}')
        else:
            await self.app(scope, _once(body), send)


def _shape(body: bytes) -> tuple[int, ...]:
    """The shape of the numbers in a request's body, () if it holds anything else."""
    try:
        content = json.loads(body)
        ((name, numbers),) = content.items()
        return np.array(numbers, dtype=np.float64).shape if name in ("inputs", "instances") else ()
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return ()  # among them numbers of thousands of digits, and brackets by the thousand


def _once(body: bytes) -> Receive:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _answer(send: Send, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


def main() -> None:
    store = Store(load_params().tracking.experiment)
    champion = by_alias(store.client, CHAMPION)
    if champion is None:
        raise UserError(f"no {CHAMPION} of {NAME} in the registry: dvc repro, then make register")
    mlflow.set_tracking_uri(store.client.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@{CHAMPION}")
    host, port = os.environ.get("HOST") or "127.0.0.1", int(os.environ.get("PORT") or 5001)
    print(f"{NAME} version {champion.version} on http://{host}:{port}/invocations", flush=True)
    uvicorn.run(
        GuardBody(scoring_server.init(model), LIMIT, model.metadata.get_input_schema().inputs[0].shape[1:]),
        host=host,
        port=port,
        log_level="warning",
    )


if __name__ == "__main__":
    run(main)
