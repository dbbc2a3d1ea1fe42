"""Where texts meet a model's tokenizer and chat template.

Both can refuse a user's text. Whatever they raise becomes a UserError that names the model and shows the beginning of
the text. Templates are rendered as if today were one fixed date, because the templates of the Llama 3 family write
today's date into the prompt, and results would otherwise depend on the day on which they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from unittest import mock

from core.errors import UserError, first_line

# How many characters of a text an error message shows.
SHOWN_CHARACTERS = 60
# The date that the Llama 3 templates fall back to when they are given none.
DATE = datetime(2024, 7, 26)
DATE_STRING = DATE.strftime("%d %b %Y")


class _FixedDatetime(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _FixedDatetime:
        return cls(DATE.year, DATE.month, DATE.day)


def templated(tokenizer: Any, messages: Sequence[dict[str, Any]], text: str, **options: Any) -> Any:
    """Render `messages` in the model's chat template as if today were `DATE`.

    Some templates take the date as the variable `date_string`. Others call transformers' `strftime_now`, which no
    argument can replace, so the clock that it reads is replaced.

    Args:
        text: the text whose beginning an error message shows.
        options: further arguments of `apply_chat_template`.
    Raises:
        UserError: the template refuses the messages (a role, or their order), or has a mistake of its own.
    """
    from transformers.utils import (
        chat_template_utils,
    )  # imports transformers, which texts without a template do not need

    try:
        with mock.patch.object(chat_template_utils, "datetime", _FixedDatetime):
            return tokenizer.apply_chat_template(list(messages), date_string=DATE_STRING, **options)
    except Exception as error:  # a template raises jinja2's errors, and any error that Python code can raise
        raise UserError(
            f"the chat template of {_model_name(tokenizer)} does not take {_beginning(text)}: {_message(error)}; "
            "change the text, leave it out, or correct the template (chat_template.jinja in the model's folder)"
        ) from None


def tokenized(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """The tokenizer's encoding of one text or of several; `options` are further arguments of its `__call__`.

    Raises:
        UserError: the tokenizer cannot encode the text, usually because it contains half of a surrogate pair; or
            character offsets were asked for and the tokenizer has none.
    """
    try:
        encoding = tokenizer(text, **options)
    except Exception as error:  # the library raises TypeError, UnicodeEncodeError and bare Exception
        first = text if isinstance(text, str) else next(iter(text), "")
        raise UserError(
            f"the tokenizer of {_model_name(tokenizer)} cannot encode {_beginning(first)}: {_message(error)}; correct "
            "the text or leave it out"
        ) from None
    if options.get("return_offsets_mapping") and "offset_mapping" not in encoding:
        name = _model_name(tokenizer)
        raise UserError(f"the tokenizer of {name} gives no character offsets; take a fast one (tokenizer.json)")
    return encoding


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of the special tokens, such as those that begin a text or end a turn."""
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _model_name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _beginning(text: str) -> str:
    return f"the text that begins {' '.join(text.split())[:SHOWN_CHARACTERS]!r}"


def _message(error: Exception) -> str:
    """What an error says, in one line that any terminal can print, after its type unless the type says nothing."""
    message = first_line(error).encode("utf-8", "backslashreplace").decode()
    return message if type(error).__name__ in ("TemplateError", "Exception") else f"{type(error).__name__}: {message}"
