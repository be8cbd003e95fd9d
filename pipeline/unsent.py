"""What the tracking store did not take: kept on disk, sent later, in order.

A file of JSON lines per process under `.unsent/` of the main checkout, named by the time of its first line; the first line says
for which store and experiment. A living process holds its file's lock; what a dead one left is anybody's to send.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.files import main_checkout, write_whole


def folder() -> Path:
    """Where it is kept."""
    return main_checkout() / ".unsent"


def set_aside(operation: str, arguments: Mapping[str, Any], reason: str) -> Path:
    """Keep an operation that a store refused, for a person to look at. Returns the file it is in."""
    folder().mkdir(exist_ok=True)
    path = folder() / "refused"
    _append(path, {"operation": operation, "arguments": arguments, "reason": reason})
    return path


class Kept:
    """What this process keeps for one experiment of one store. The address, which may hold a password, is not written down."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.addressee = {"store": hashlib.sha256(uri.encode()).hexdigest(), "experiment": experiment}
        self.path: Path | None = None
        self.lock: FileLock | None = None

    def add(self, operation: str, arguments: Mapping[str, Any]) -> None:
        """Keep one more operation. It is on the disk when this returns."""
        if self.path is None:
            folder().mkdir(exist_ok=True)
            path = folder() / f"{time.time_ns()}-{os.getpid()}.jsonl"
            self.lock = FileLock(path.with_suffix(".lock"))
            self.lock.acquire()
            self.path = path
            _append(path, self.addressee)
        _append(self.path, {"operation": operation, "arguments": arguments})

    def send(self, do: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Send what this process has kept. Whatever `do` raises ends it; the rest stays."""
        if self.path is not None:
            _send(self.path, do)
            self._let_go()

    def send_left(self, do: Callable[[str, Mapping[str, Any]], None]) -> int:
        """Send what ended processes have kept for the same experiment, the oldest first; how many operations that was.

        Whatever `do` raises ends it; the rest stays.
        """
        count = 0
        if not folder().is_dir():
            return count
        with FileLock(folder() / "sending"):  # so that a later stage waits until an earlier one's are in
            for path in sorted(folder().glob("*.jsonl")):
                try:
                    with FileLock(path.with_suffix(".lock"), blocking=False):
                        if (_lines(path) or [self.addressee])[0] == self.addressee:
                            count += _send(path, do)
                            path.with_suffix(".lock").unlink()
                except Timeout:
                    continue  # its process lives
        return count

    def _let_go(self) -> None:
        self.lock.release()
        self.path.with_suffix(".lock").unlink(missing_ok=True)
        self.path = self.lock = None


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that is torn, since its process was killed, is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _send(path: Path, do: Callable[[str, Mapping[str, Any]], None]) -> int:
    """Send a file's operations; each that is sent is struck off, the file goes with the last."""
    lines = _lines(path)
    operations = lines[1:]
    sent = 0
    try:
        for line in operations:
            do(line["operation"], line["arguments"])
            sent += 1
    finally:
        if sent == len(operations):
            path.unlink()
        elif sent:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in (lines[0], *operations[sent:])))
    return sent
