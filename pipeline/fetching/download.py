"""Download one file: whole or not at all, going on where a broken connection stopped."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
import urllib3
from filelock import FileLock
from tqdm import tqdm

WAITS = (0, 1, 2, 4, 8)  # seconds before each attempt
SILENCE = 20  # seconds without an answer, or without another byte, after which an attempt is given up
CHUNK = 2**16  # bytes


def download(urls: Sequence[str], path: Path, wrong: Callable[[Path], str | None]) -> None:
    """Put what `urls`, places of the same file, serve to `path`.

    `wrong(path)` says what is wrong with a file, None if nothing. What has come is kept beside `path`, hidden, until the file
    is whole, so that a later call goes on with it. A second process that wants the same file waits for the first.

    Raises ConnectionError if no place has a right file to give: at once where they all refuse it, else after the last of
    the attempts. Raises OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    places, problem = list(urls), ""
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file() and not wrong(path):
            return  # another process was at it
        for wait in WAITS:
            time.sleep(wait)
            for url in tuple(places):
                try:
                    resumed = _go_on(url, partial)
                except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    problem = f"{url}: {error}"
                    if _refused(error):
                        places.remove(url)
                    continue
                mistake = wrong(partial)
                if not mistake:
                    os.replace(partial, path)
                    _tag(partial).unlink(missing_ok=True)
                    return
                problem = f"{url} serves another file: {mistake}"
                partial.unlink()
                if not resumed:  # else its beginning may be to blame
                    places.remove(url)
            if not places:
                break
    raise ConnectionError(problem if not places else f"{len(WAITS)} attempts, the last: {problem}")


def _go_on(url: str, partial: Path) -> bool:
    """Fetch what `partial` lacks, or all if the host has no ranges or the file there has changed. True if it went on."""
    tag = _tag(partial)
    headers = {"Accept-Encoding": "identity"}  # the file's own bytes, which ranges count
    if partial.is_file() and tag.is_file():
        headers |= {"Range": f"bytes={partial.stat().st_size}-", "If-Range": tag.read_text()}
    with requests.get(url, headers=headers, stream=True, timeout=SILENCE) as answer:
        if answer.status_code == requests.codes.requested_range_not_satisfiable:
            return True  # nothing is lacking
        answer.raise_for_status()
        resumed = answer.status_code == requests.codes.partial_content
        if not resumed:
            tag.unlink(missing_ok=True)
        with partial.open("ab" if resumed else "wb") as file, _progress(url, file.tell(), answer) as progress:
            if not resumed and (state := _state(answer)):
                tag.write_text(state)
            for chunk in answer.raw.stream(CHUNK, decode_content=False):
                file.write(chunk)
                progress.update(len(chunk))
    return resumed


def _tag(partial: Path) -> Path:
    """Where the state of the file that `partial` is the beginning of is noted."""
    return partial.with_suffix(".tag")


def _state(answer: requests.Response) -> str | None:
    """What tells the file from a changed one at the same place (RFC 9110, section 13.1.5), if the host says."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified")  # a weak tag is none


def _refused(error: Exception) -> bool:
    """Whether asking again would change nothing."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 429)  # too slow, too often


def _progress(url: str, there: int, answer: requests.Response) -> tqdm:
    """A progress bar, on a terminal alone."""
    size = there + int(answer.headers.get("Content-Length", 0))
    return tqdm(desc=url.rpartition("/")[2], total=size or None, initial=there, unit="B", unit_scale=True, disable=None)
