"""How a command starts and ends: its arguments, its exit status, and what it says when it fails."""

import gc
import inspect
import io
import os
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.core.errors import UserError, file_problem, one_line
from pipeline.core.tracking_uri import masked, store_problem


def run(main: Callable[..., None], options: ArgumentParser | None = None, **choices: Sequence[str] | None) -> None:
    """Run `main` as a process, with one command-line argument for each name in `choices`: one of its values or, for None, any.

    An argument may be left out if `main` has a default for it. A command with other arguments than these gives them as a parser,
    `options`; `main` gets each by its name.

    A `UserError`, or what `file_problem` and `store_problem` know, becomes one line on stderr and exit status 1, Ctrl-C status
    130. Anything else is a defect of ours and keeps its traceback, without credentials. Under DVC, which would record changed
    code as the code that ran, changed code is an error. What a terminal cannot show is escaped there.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    description = {"description": sys.modules["__main__"].__doc__, "formatter_class": RawDescriptionHelpFormatter}
    parser = ArgumentParser(**description, parents=[options] if options else [])
    for name, values in choices.items():
        default = inspect.signature(main).parameters[name].default
        optional = {} if default is inspect.Parameter.empty else {"nargs": "?", "default": default}
        parser.add_argument(name, choices=values, **optional)
    arguments, under_dvc = vars(parser.parse_args()), "DVC_STAGE" in os.environ
    if under_dvc:
        from pipeline.core.provenance import code_digest  # needs packages that serving.predict does without

        code = code_digest()
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    try:
        if under_dvc:
            _refuse_shallow()
        main(**arguments)
        if under_dvc and code_digest() != code:
            raise UserError("pipeline/ was edited while the stage ran: run it again (finished trainings are kept)")
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = error if isinstance(error, UserError) else store_problem(error)
        if message is None and isinstance(error, OSError):
            message = file_problem(error)
        sys.exit(masked(traceback.format_exc()) if message is None else f"error: {one_line(masked(message))}")
    finally:
        gc.freeze()  # else all that is left is looked through for cycles when the process ends: up to 1.5 s


def read_port(text: str) -> int:
    """A port's number. Raises UserError for anything else."""
    if text.isdecimal() and 0 < int(text[:9]) < 2**16:
        return int(text)
    raise UserError(f"PORT = {text!r}: a number from 1 to 65535 is wanted")


def _refuse_shallow() -> None:
    """Raises UserError in an experiment's temporary copy of a shallow clone: DVC would run it, and lose it without a word."""
    from pipeline.core.files import main_checkout

    if Path.cwd() != main_checkout() and (main_checkout() / ".git" / "shallow").is_file():
        raise UserError(
            f"{main_checkout()} is a shallow clone, where DVC loses experiments: git fetch --unshallow, then run again"
        )


def end_with(parent: int) -> None:
    """End this process when `parent`, which started it, has ended, as by `kill -9`: nothing else would tell it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
