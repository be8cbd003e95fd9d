"""Errors that a user can do something about, and how a stage's process starts and ends."""

import argparse
import atexit
import errno
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# What the libraries' imports create stays. Looking through it for garbage as often as Python does by default takes a fifth of
# a stage's start.
gc.set_threshold(100_000)

LONGEST = 1000  # characters of a message


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


def run(main: Callable[..., None], **choices: Sequence[str] | None) -> None:
    """Run a stage as a process: `main` with one command-line argument for each name in `choices`.

    An argument is one of the values given for it or, for None, any text.

    A `UserError` or a full disk becomes one line on stderr and exit status 1, Ctrl-C status 130. Anything else is a defect
    of ours and keeps its traceback. Does not return.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, values in choices.items():
        parser.add_argument(name, choices=values)
    arguments = vars(parser.parse_args())
    status = 0
    try:
        main(**arguments)
    except UserError as error:
        status = _say(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        status = _say(f"no space left on the disk while writing {error.filename or 'a file'}: free some and run again")
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = int(end.code or 0)
    # Python would now take PyTorch apart, which takes longer than some stages' work: leave that to the system.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def one_line(message: object) -> str:
    """`message` as a line for a terminal, whatever hostile input put into it: printable, and not endless."""
    text = " ".join(str(message).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _say(message: object) -> int:
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # one of several processes: what started them says it, once
        Path(path).write_text(json.dumps({"message": one_line(message), "timestamp": int(time.time())}))
    else:
        print(f"error: {one_line(message)}", file=sys.stderr)
    return 1
