"""The error that a user can correct, and the one line that any error has to say."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. It is shown as one line that says what was given, what was expected and what to do, and the command
    ends with exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type when the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
