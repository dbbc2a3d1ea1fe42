"""Where texts meet a model's tokenizer and chat template.

Both can refuse what a user gives them; what they raise is told here, with the model and the beginning of the text.
Templates are rendered at one date, because those of the Llama 3 family write today's into the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from unittest import mock

from core.errors import UserError, first_line

# What an error shows of a text.
BEGINNING = 60
# What the Llama 3 templates take themselves where they cannot ask for the date.
DATE = datetime(2024, 7, 26)
DATE_STRING = DATE.strftime("%d %b %Y")


class _Fixed(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Fixed:
        return cls(DATE.year, DATE.month, DATE.day)


def templated(tokenizer: Any, messages: Sequence[dict[str, Any]], text: str, **options: Any) -> Any:
    """`messages` in the model's chat template as if today were `DATE`: no result depends on the day it was made.

    Templates take the date as `date_string`, or ask transformers' `strftime_now`, which no argument can replace.

    Args:
        text: what the error shows the beginning of.
        options: those of `apply_chat_template`.
    Raises:
        UserError: the template refuses the messages (a role, their order), or has a mistake of its own.
    """
    from transformers.utils import chat_template_utils

    try:
        with mock.patch.object(chat_template_utils, "datetime", _Fixed):
            return tokenizer.apply_chat_template(list(messages), date_string=DATE_STRING, **options)
    except Exception as error:  # templates raise jinja2's errors and whatever their Python code does
        raise UserError(
            f"the chat template of {_model(tokenizer)} does not take {_shown(text)}: {_said(error)}; change the text, "
            "leave it out, or correct the template (chat_template.jinja in the model's folder)"
        ) from None


def tokenized(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """The tokenizer's encoding of a text, or of several; `options` are those of its `__call__`.

    Raises:
        UserError: the tokenizer cannot encode the text (half of a surrogate pair is the usual reason), or has no
            character offsets where they are asked for.
    """
    try:
        done = tokenizer(text, **options)
    except Exception as error:  # the library raises TypeError, UnicodeEncodeError and bare Exception
        first = text if isinstance(text, str) else next(iter(text), "")
        raise UserError(
            f"the tokenizer of {_model(tokenizer)} cannot encode {_shown(first)}: {_said(error)}; correct the text or "
            "leave it out"
        ) from None
    if options.get("return_offsets_mapping") and "offset_mapping" not in done:
        message = "gives no character offsets; take a fast one (tokenizer.json)"
        raise UserError(f"the tokenizer of {_model(tokenizer)} {message}")
    return done


def _model(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _shown(text: str) -> str:
    return f"the text that begins {' '.join(text.split())[:BEGINNING]!r}"


def _said(error: Exception) -> str:
    """The error in one line that any terminal can print."""
    said = first_line(error).encode("utf-8", "backslashreplace").decode()
    return said if type(error).__name__ in ("TemplateError", "Exception") else f"{type(error).__name__}: {said}"
