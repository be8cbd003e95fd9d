"""Errors that a user can do something about."""

import contextlib
import errno
from collections.abc import Iterator

LONGEST = 1000  # characters of a message
# What a file system refuses because of how it is set up: rights, names, a file in a folder's place, a folder in a file's.
OF_THE_USER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
OF_THE_USER |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def user_error(message: str, *errors: type[Exception], then: str = "") -> Iterator[None]:
    """Turn these errors in the block into a UserError: `message`, the error, and what to do. A full disk stays what it is."""
    try:
        yield
    except errors as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{message}: {error}" + (f": {then}" if then else "")) from error


def one_line(message: object) -> str:
    """`message` as one printable line of at most `LONGEST` characters, whatever the input put into it."""
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def printable(text: str) -> str:
    """`text` with a question mark for every character that moves a cursor, rings, or shows nothing; a new line too."""
    return "".join(char if char.isprintable() else "?" for char in text)


def is_disk_full(error: BaseException) -> bool:
    """Whether there is no space left, or none of the user's quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def file_problem(error: OSError) -> str | None:
    """The message for a full disk and for a file or folder that the user must put right; None for any other error."""
    if is_disk_full(error):
        return f"no space left on the disk while writing {error.filename or 'a file'}: free some and run again"
    name = error.filename2 or error.filename  # of two, where it was to go
    return f"{name}: {error.strerror}" if name and error.errno in OF_THE_USER else None
