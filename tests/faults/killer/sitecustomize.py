"""Kills a process where it is about to replace a file or to commit: Python imports the module of this name when it starts.

KILL_COUNTER names a file that gets a byte for each such place, in whichever process; at the one with the number KILL_AT, the
process is killed (an even number: with its whole group).
"""

import functools
import os
import signal
import sqlite3


def place() -> None:
    with open(os.environ["KILL_COUNTER"], "ab") as file:  # noqa: PTH123 (as few imports as there can be)
        file.write(b".")
        number = file.tell()
    if number == int(os.environ["KILL_AT"]):
        os.kill(os.getpid() if number % 2 else 0, signal.SIGKILL)  # 0: every process of the group


class Connection(sqlite3.Connection):
    def commit(self) -> None:
        if self.in_transaction:
            place()
        super().commit()


def replace(*arguments, **options) -> None:
    place()
    original(*arguments, **options)


if "KILL_COUNTER" in os.environ:
    original, os.replace = os.replace, replace
    sqlite3.connect = sqlite3.dbapi2.connect = functools.partial(sqlite3.connect, factory=Connection)
