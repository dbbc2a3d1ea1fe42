"""A row: one text, as the messages of a conversation or as plain text; and how records of any data set become rows."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from core.errors import UserError
from core.texts.tokens import templated

# How conversations spell the roles of chat templates.
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
# Hexadecimal digits of the digests by which rows and groups are told apart.
DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Row:
    """One text: its messages (role, content), or a single message without a role."""

    messages: tuple[tuple[str | None, str], ...]
    # What the row belongs to (a topic, a document): rows of one group are never in two parts of the split, and groups
    # are the unit of the intervals. Two rows with the same messages are the same row, whatever their groups.
    group: str = field(default="", compare=False)

    @property
    def has_roles(self) -> bool:
        """Whether a chat template applies."""
        return self.messages[0][0] is not None

    @property
    def plain(self) -> str:
        """The untemplated string that both models read with token pooling."""
        return "\n".join(content for _, content in self.messages)

    @property
    def own_text(self) -> str:
        """All that is said but the system prompt, which many rows of a data set share."""
        return "\n".join(content for role, content in self.messages if role != "system")

    @cached_property
    def digest(self) -> str:
        """Of the normalised text without the system prompt: by it a later stage knows a row that was read before."""
        return digest_of_text(normalised(self.own_text))

    def render(self, tokenizer: Any) -> tuple[str, bool]:
        """(string for this model, whether the tokenizer should add its special tokens). Raises UserError as
        `templated`."""
        if not self.has_roles or not tokenizer.chat_template:
            return self.plain, True
        return templated(tokenizer, self.chat(), self.own_text, tokenize=False), False

    def chat(self) -> list[dict[str, str]]:
        """Messages as chat templates take them."""
        return [{"role": role or "user", "content": content} for role, content in self.messages]


def normalised(text: str) -> str:
    """What counts when texts are compared: compatible characters (NFKC), case and white space make no difference."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest_of_text(text: str) -> str:
    """The first digits of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_LENGTH]


def row_of(record: dict[str, Any], where: str, strict: bool) -> Row | None:
    """The messages of a record; None for one without a text, or with an unknown role, where that is no error (not
    `strict`: a data set of the hub, which nobody here can mend)."""
    there = {column: value for column, value in record.items() if value is not None}  # files that mix columns
    messages = _messages(there) or _messages(record)
    if messages is None:
        raise UserError(f"{where} has the columns {', '.join(record)}; expected {EXPECTED}")
    roles = [role for role, _ in messages if role is not None and role not in ROLES]
    kept = []
    for role, content in messages:
        # Many data sets have an empty system prompt in every row.
        if role != "system" or (isinstance(content, str) and content.strip()):
            kept.append((ROLES.get(role or "", role), content))
    empty = not kept or any(not isinstance(content, str) or not content.strip() for _, content in kept)
    if strict and roles:
        raise UserError(f"{where} has the role {roles[0]!r}; expected one of {', '.join(ROLES)}")
    if strict and empty:
        raise UserError(f"{where} has an empty text; remove it or fill it in")
    return None if roles or empty else Row(tuple(kept))


def _messages(record: dict[str, Any]) -> list[tuple[str | None, Any]] | None:
    """(role, content) of each message, by the first set of role columns that the record has; None: none of them."""
    system: list[tuple[str | None, Any]] = [("system", record.get("system"))]
    for column in ("messages", "conversations"):
        turns = record.get(column)
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            roles = [str(turn.get("role") or turn.get("from")) for turn in turns]
            contents = [turn.get("content") or turn.get("value") for turn in turns]
            return list(zip(roles, contents, strict=True))
    if "instruction" in record and "output" in record:
        parts = (record["instruction"], record.get("input"))
        asked = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
        return [*system, ("user", asked), ("assistant", record["output"])]
    for ask, answer in (("user", "assistant"), ("question", "answer")):
        if ask in record and answer in record:
            return [*system, ("user", record[ask]), ("assistant", record[answer])]
    return [(None, record["text"])] if "text" in record else None
