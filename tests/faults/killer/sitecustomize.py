"""Kills a process where it is about to replace a file or to commit: Python imports the module of this name when it starts.

KILL_COUNTER names a file that gets a byte for each such place, in whichever process; at the one with the number KILL_AT, the
process is killed (an even number: with its whole group).
"""

import os
import signal
import sqlite3
import sys


def place() -> None:
    with open(os.environ["KILL_COUNTER"], "ab") as file:  # noqa: PTH123 (as few imports as there can be)
        file.write(b".")
        number = file.tell()
    if number == int(os.environ["KILL_AT"]):
        os.kill(os.getpid() if number % 2 else 0, signal.SIGKILL)  # 0: every process of the group


def connect(*arguments, **options) -> sqlite3.Connection:
    connection = original(*arguments, **options)
    connection.set_trace_callback(lambda statement: place() if statement.upper().startswith("COMMIT") else None)
    return connection


if "KILL_COUNTER" in os.environ:
    sys.addaudithook(lambda event, _: place() if event == "os.rename" else None)  # os.replace's too
    original, sqlite3.connect = sqlite3.connect, connect
    sqlite3.dbapi2.connect = connect
