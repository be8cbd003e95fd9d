"""Download one file: verified, atomic, resumed where a broken connection stopped."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import requests
from filelock import FileLock
from tqdm import tqdm

from pipeline.core.files import digest

WAITS = (0, 1, 2, 4, 8)  # seconds before each attempt
SILENCE = 20  # seconds without an answer, or without another byte, after which an attempt is given up
CHUNK = 2**16  # bytes


class Checksum(NamedTuple):
    """A file's published checksum: hashlib's name of the algorithm, and the digest in hex or its beginning."""

    algorithm: str
    digest: str

    def mismatch(self, path: Path) -> str | None:
        """What is wrong with the file at `path`, for a message; None if its checksum is this."""
        actual = digest(path, self.algorithm)
        return None if actual.startswith(self.digest) else f"wrong checksum: {self.algorithm} is {actual}, not {self.digest}"


def download(urls: Sequence[str], path: Path, checksum: Checksum) -> None:
    """Put the file that each of `urls` serves to `path`. A second process that wants the same file waits for the first.

    A partial file is kept beside `path`, hidden, and a later call resumes it. Raises ConnectionError if no URL serves the right
    file: at once where they all refuse it, else after the last attempt. Raises OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    candidates, problem = list(urls), ""
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file() and not checksum.mismatch(path):
            return  # another process has downloaded it
        for wait in WAITS:
            time.sleep(wait)
            for url in tuple(candidates):
                try:
                    resumed = _fetch(url, partial)
                except requests.RequestException as error:
                    status = 0 if error.response is None else error.response.status_code
                    problem, final = f"{url}: {error}", 400 <= status < 500 and status not in (408, 429)  # too slow, too often
                else:
                    mismatch = checksum.mismatch(partial)
                    if not mismatch:
                        os.replace(partial, path)
                        return
                    problem, final = f"{url} serves another file: {mismatch}", not resumed
                    partial.unlink()  # where it was resumed, the part from before may be to blame: start over
                if final:
                    candidates.remove(url)
            if not candidates:
                raise ConnectionError(problem)
    raise ConnectionError(f"{len(WAITS)} attempts, the last: {problem}")


def _fetch(url: str, partial: Path) -> bool:
    """Download what `partial` lacks, or everything from a host without ranges. True if it resumed."""
    size = partial.stat().st_size if partial.is_file() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    with requests.get(url, headers=headers, stream=True, timeout=SILENCE) as answer:
        if size and answer.status_code == requests.codes.requested_range_not_satisfiable:
            return True  # nothing is missing
        answer.raise_for_status()
        resumed = answer.status_code == requests.codes.partial_content
        start = size if resumed else 0
        total = start + int(answer.headers.get("Content-Length", 0)) or None
        bar = tqdm(desc=partial.name[1:-8], total=total, initial=start, unit="B", unit_scale=True, disable=None)
        with partial.open("ab" if resumed else "wb") as file, bar:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return resumed
