"""Notes what every Python process of a stage reads and writes: Python imports the module of this name when it starts.

tests/test_graph.py puts this folder and the checkout on PYTHONPATH and reads the notes: a line of kind and name for each.
"""

import os
import re
import sys

KEPT = ("data/", "models/", "metrics/")  # where the graph's files lie


def note(kind: str, name: str) -> None:
    os.write(notes, f"{kind} {name}\n".encode())


def watch_files(event: str, arguments: tuple) -> None:
    """An audit hook."""
    if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str | os.PathLike):
        return
    path = os.path.normpath(re.sub(r"\.[^/]+\.\d+\.partial(/|$)", "", os.path.relpath(arguments[0])))  # on its way to its name
    if path.startswith(KEPT) and not path.startswith("data/downloads"):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        note("writes" if writes else "reads", path)


def watch_params() -> None:
    """Note the dotted name of each value that is read of what load_params returns."""
    from pipeline import params

    load_params, prefixes = params.load_params, {}

    def remember(block: params.Block, prefix: str) -> None:
        prefixes[id(block)] = prefix
        for name in type(block).model_fields:
            if isinstance(value := object.__getattribute__(block, name), params.Block):
                remember(value, f"{prefix}{name}.")

    def watched(self: params.Block, name: str) -> object:
        value = object.__getattribute__(self, name)
        if (prefix := prefixes.get(id(self))) is not None:
            if name == "model_dump":
                for key in type(self).model_fields:
                    getattr(self, key)
            elif name in type(self).model_fields and not isinstance(value, params.Block):
                note("param", prefix + name)
        return value

    def load() -> params.Params:
        remember(loaded := load_params(), "")
        alive.append(loaded)  # another object would get its id
        return loaded

    alive: list[params.Params] = []
    params.Block.__getattribute__, params.load_params = watched, load


if "DVC_STAGE" in os.environ:
    path = os.path.join(os.environ["OBSERVED"], os.environ["DVC_STAGE"])  # noqa: PTH118 (as few imports as there can be)
    notes = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    sys.addaudithook(watch_files)
    if "-m" in sys.orig_argv:  # the stage itself
        watch_params()
