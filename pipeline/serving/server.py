"""Serve the champion with MLflow's model server: `make serve` (PORT=5001, HOST=127.0.0.1).

POST images as JSON to /invocations; see README.md. Bodies over 4 MiB are refused and not kept.
"""

import json
import os

import mlflow
import numpy as np
import uvicorn
from mlflow.pyfunc import scoring_server
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.serving.registry import CHAMPION, NAME, by_alias, open_store

LIMIT = 4 * 2**20  # bytes of a request's body


class GuardBody:
    """ASGI middleware that passes nothing but images to the app, which would take minutes and gigabytes to refuse the rest.

    413 for a body over the limit, 415 for another type than JSON, 400 for JSON that is not `inputs` (or `instances`, as
    TensorFlow's servers name them) of numbers of shape (N, *shape).
    """

    def __init__(self, app: ASGIApp, limit: int, shape: tuple[int, ...]) -> None:
        self.app, self.limit, self.shape = app, limit, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body; answer with an error or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            body.extend(part) if size <= self.limit else body.clear()

        async def receive_body() -> Message:
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        app, posted = self.app, scope["method"] == "POST"
        if size > self.limit:
            app = PlainTextResponse(f"the body is over the limit of {self.limit} bytes", 413)
        elif posted and dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0] != b"application/json":
            app = PlainTextResponse("only application/json is read", 415)  # MLflow would unpack parquet, of any size
        elif posted and _shape(body)[1:] != self.shape:
            shape = f"(N, {', '.join(map(str, self.shape))})"
            app = PlainTextResponse(f'the body is no JSON of the form {{"inputs": numbers of shape {shape}}}', 400)
        return await app(scope, receive_body, send)


def _shape(body: bytes) -> tuple[int, ...]:
    """The shape of the numbers in a request's body, () if it holds anything else."""
    try:
        ((name, numbers),) = json.loads(body).items()
        return np.array(numbers, dtype=np.float64).shape if name in ("inputs", "instances") else ()
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return ()  # among them numbers of thousands of digits, and brackets by the thousand


def main() -> None:
    """Serve until interrupted."""
    client = open_store()
    champion = by_alias(client, CHAMPION)
    if champion is None:
        raise UserError(f"no {CHAMPION} of {NAME} in the registry: dvc repro, then make register")
    mlflow.set_tracking_uri(client.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@{CHAMPION}")
    app = GuardBody(scoring_server.init(model), LIMIT, model.metadata.get_input_schema().inputs[0].shape[1:])
    host, port = os.environ.get("HOST") or "127.0.0.1", int(os.environ.get("PORT") or 5001)
    print(f"{NAME} version {champion.version} on http://{host}:{port}/invocations", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")


if __name__ == "__main__":
    run(main)
