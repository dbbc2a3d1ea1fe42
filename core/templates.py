"""Chat templates at a fixed date: those of the Llama 3 family write today's into the prompt."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from unittest import mock

# What the Llama 3 templates take themselves where they cannot ask for the date.
DATE = datetime(2024, 7, 26)
DATE_STRING = DATE.strftime("%d %b %Y")


class _Fixed(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Fixed:
        return cls(DATE.year, DATE.month, DATE.day)


def render(tokenizer: Any, chat: list[dict[str, Any]], **options: Any) -> Any:
    """`tokenizer.apply_chat_template` as if today were `DATE`, so that no result depends on the day it was made.

    Templates take the date as `date_string`, or ask transformers' `strftime_now`, which no argument can replace.
    """
    from transformers.utils import chat_template_utils

    with mock.patch.object(chat_template_utils, "datetime", _Fixed):
        return tokenizer.apply_chat_template(chat, date_string=DATE_STRING, **options)
