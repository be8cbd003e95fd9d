"""Try a published student in a browser: `make try` (TRY_PORT=5002; TRACK=distillation: digits). Ctrl-C ends it.

The page computes with ONNX Runtime Web: no image leaves the browser. Needs what serving.predict does and, the first time, npm.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import tarfile
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipeline.core.cli import read_port, run
from pipeline.core.errors import UserError, user_error
from pipeline.export.onnx_model import Student
from pipeline.serving.predict import PUBLISHED

PACKAGE = "onnxruntime-web@1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # in base64, as npm has it
DOWNLOADS = Path(__file__).parents[2] / "data/downloads"
POLICY = "default-src 'none'; connect-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
POLICY += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def main(track: str = "baselines") -> None:
    """Serve the page for a track's published student until interrupted."""
    port, page = read_port(os.environ.get("PORT") or "5002"), Path(__file__).with_suffix(".html")
    student, (module, binary) = Student(PUBLISHED / f"{track}.onnx"), read_runtime(DOWNLOADS)
    about = {"file": student.path.name, "classes": student.classes, "shape": student.shape, "resize": student.resize}
    files = {
        "/": ("text/html; charset=utf-8", page.read_bytes()),
        "/try_student.js": ("text/javascript", page.with_suffix(".js").read_bytes()),
        "/student.json": ("application/json", json.dumps(about).encode()),
        "/student.onnx": ("application/octet-stream", student.path.read_bytes()),
        "/ort.mjs": ("text/javascript", module),
        "/ort.wasm": ("application/wasm", binary),
    }
    with user_error(f"cannot listen on 127.0.0.1:{port}", OSError, then="PORT=... (make try TRY_PORT=...) names another port"):
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(files, {f"127.0.0.1:{port}", f"localhost:{port}"}))
    print(f"{student.path.name} on http://127.0.0.1:{port}/", flush=True)
    server.serve_forever()


def read_runtime(folder: Path) -> tuple[bytes, bytes]:
    """ONNX Runtime Web's module and its WebAssembly, from the package that npm puts into `folder`. Raises UserError."""
    path = folder / f"{PACKAGE.replace('@', '-')}.tgz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", PACKAGE, "--pack-destination", folder, "--fetch-retries=0", "--loglevel=error"]
        with user_error(f"{path} is missing, and npm to fetch it", FileNotFoundError, then="install Node.js"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise UserError(f"npm did not fetch {PACKAGE}: {done.stderr[:200]}")
    if b64encode(hashlib.sha512(path.read_bytes()).digest()).decode() != SHA512:
        raise UserError(f"{path}: damaged, or not the {PACKAGE} that is wanted: delete it")
    with tarfile.open(path) as package:
        ends = ".wasm.bundle.min.mjs", "-wasm-simd-threaded.wasm"
        return tuple(package.extractfile(f"package/dist/ort{end}").read() for end in ends)


def handler(files: dict[str, tuple[str, bytes]], hosts: set[str]) -> type[BaseHTTPRequestHandler]:
    """What answers GET for `files` (by path: MIME type, content), to requests for one of `hosts` alone (DNS rebinding)."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds for a request to come
        log_message = staticmethod(lambda *_: None)  # the address stays in view

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # of a browser that goes away in the middle of an answer
                super().handle()

        def do_GET(self) -> None:
            if self.path not in files or self.headers["Host"] not in hosts:
                self.send_error(404)
                return
            kind, content = files[self.path]
            self.send_response(200)
            headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
            for name, value in (headers | {"Content-Length": str(len(content)), "Cache-Control": "no-store"}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    return Handler


if __name__ == "__main__":
    run(main, track=sorted(path.stem for path in PUBLISHED.glob("*.onnx")))
