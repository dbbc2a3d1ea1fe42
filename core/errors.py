"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Shown as one line (what was got, what was expected, what to do); the command exits with 2."""


def first_line(error: BaseException) -> str:
    """What an error says in one line; its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
