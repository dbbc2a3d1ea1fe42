"""A row is one text: the messages of a conversation, or plain text. Here records of any data set become rows."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from core.errors import UserError
from core.texts.tokens import templated

# Role as data sets spell it -> role as chat templates spell it.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
EXPECTED = (
    "messages (or conversations), instruction [+ input] + output, [system +] user + assistant, question + answer, "
    "or text"
)
# Hexadecimal digits of the digests that stand for rows, passages and questions.
DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Row:
    """One text.

    Attributes:
        messages: (role, content) of each message; plain text is a single message whose role is None.
        group: name of what the row belongs to, such as a topic or a document. Rows of one group are always in the same
            part of the split, and groups are the unit of the confidence intervals. It is not compared: two rows with
            the same messages are equal, whatever their groups.
    """

    messages: tuple[tuple[str | None, str], ...]
    group: str = field(default="", compare=False)

    @property
    def has_roles(self) -> bool:
        """Whether the row is a conversation, which is rendered with a chat template."""
        return self.messages[0][0] is not None

    @property
    def plain(self) -> str:
        """The text without a chat template. Both models read this same string with token pooling."""
        return "\n".join(content for _, content in self.messages)

    @property
    def own_text(self) -> str:
        """The text without the system prompt, which many rows of a data set often share."""
        return "\n".join(content for role, content in self.messages if role != "system")

    @cached_property
    def digest(self) -> str:
        """Digest of the normalised text without the system prompt. Later stages recognise by it a row that was read."""
        return digest_of_text(normalised(self.own_text))

    def render(self, tokenizer: Any) -> tuple[str, bool]:
        """The string that one model reads: a conversation in its chat template, other text as it is.

        Returns:
            (string, whether the tokenizer should add its special tokens). A template writes them itself.
        Raises:
            UserError: the chat template refuses the messages.
        """
        if not self.has_roles or not tokenizer.chat_template:
            return self.plain, True
        return templated(tokenizer, self.chat(), self.own_text, tokenize=False), False

    def chat(self) -> list[dict[str, str]]:
        """The messages in the form that chat templates take; plain text becomes a message of the user."""
        return [{"role": role or "user", "content": content} for role, content in self.messages]


def normalised(text: str) -> str:
    """The form in which texts are compared: compatible characters are unified (NFKC), case is folded, and every run of
    white space is one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest_of_text(text: str) -> str:
    """The first DIGEST_LENGTH hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_LENGTH]


def row_of(record: dict[str, Any], where: str, strict: bool) -> Row | None:
    """Make a row of a record.

    Args:
        record: column -> value.
        where: name of the record in error messages.
        strict: raise an error for a record without a text or with an unknown role, instead of returning None. A user
            can correct a file, but not a data set of the hub.
    Raises:
        UserError: the columns are none of those expected; or the record has no text or an unknown role (`strict`).
    """
    # In a file whose rows have different columns, the columns that a row lacks are None.
    filled = {column: value for column, value in record.items() if value is not None}
    messages = _messages(filled) or _messages(record)
    if messages is None:
        raise UserError(f"{where} has the columns {', '.join(record)}; expected {EXPECTED}")
    unknown = [role for role, _ in messages if role is not None and role not in ROLES]
    kept = []
    for role, content in messages:
        # Many data sets have an empty system prompt in every row.
        if role != "system" or (isinstance(content, str) and content.strip()):
            kept.append((ROLES.get(role or "", role), content))
    empty = not kept or any(not isinstance(content, str) or not content.strip() for _, content in kept)
    if strict and unknown:
        raise UserError(f"{where} has the role {unknown[0]!r}; expected one of {', '.join(ROLES)}")
    if strict and empty:
        raise UserError(f"{where} has an empty text; remove it or fill it in")
    return None if unknown or empty else Row(tuple(kept))


def _messages(record: dict[str, Any]) -> list[tuple[str | None, Any]] | None:
    """(role, content) of each message, from the first set of columns that the record has; None if it has none."""
    system: list[tuple[str | None, Any]] = [("system", record.get("system"))]
    for column in ("messages", "conversations"):
        turns = record.get(column)
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            roles = [str(turn.get("role") or turn.get("from")) for turn in turns]
            contents = [turn.get("content") or turn.get("value") for turn in turns]
            return list(zip(roles, contents, strict=True))
    if "instruction" in record and "output" in record:
        parts = (record["instruction"], record.get("input"))
        question = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
        return [*system, ("user", question), ("assistant", record["output"])]
    for question, answer in (("user", "assistant"), ("question", "answer")):
        if question in record and answer in record:
            return [*system, ("user", record[question]), ("assistant", record[answer])]
    return [(None, record["text"])] if "text" in record else None
