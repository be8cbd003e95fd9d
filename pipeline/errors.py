"""Errors that a user can do something about, told in one line."""

import errno
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` end a process the way a command should.

    A `UserError` or a full disk becomes one line on stderr and exit status 1; Ctrl-C becomes status 130.
    Anything else is a defect of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            sys.exit(f"error: {' '.join(str(error).split())}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            sys.exit(
                f"error: no space left on the disk while writing {error.filename or 'a file'}: free some and run again"
            )
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapper
