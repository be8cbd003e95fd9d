"""Errors that a user can do something about."""

LONGEST = 1000  # characters of a message


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


def one_line(message: object) -> str:
    """`message` as one printable line of at most `LONGEST` characters, whatever the input put into it."""
    text = " ".join(str(message).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
