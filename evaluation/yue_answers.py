"""Prediction files of Yue-MMLU: their format, and which option a prediction chooses by the benchmark's own rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Indel

from core.runs import UserError, read_json
from evaluation.yue_mmlu import OPTIONS

FILE_NAME = re.compile(r"cmmlu-yue-(?P<subject>.+)-(?P<shots>\d+)shot\.json")
_CONCLUSION = "(?:因此|所以|综上所述|总之|故|結論是|結論)"
_ANSWER = "(?:答案|選擇|选择|选项|字母|標准答案|正确答案)"
_STATED = _ANSWER + r".{0,10}?[是为為:].{0,10}?([A-D])\b"
_START = r"(?:^|。|\n)"
_OPTION_LINE = re.compile(r"^([A-D])\.(.*)$", re.MULTILINE)
# Rules 2 to 7, in the order in which they are tried; each finds the leftmost place, and the nearest words from there.
_PATTERNS = {
    2: re.compile(rf"{_CONCLUSION}.{{0,20}}?{_ANSWER}.{{0,10}}?是[^ABCD]*?([A-D])\b", re.IGNORECASE | re.DOTALL),
    3: re.compile(rf"{_START}[A-Za-z\s]*{_STATED}", re.IGNORECASE),
    4: re.compile(rf"{_START}([A-D])[是为為:。]"),
    5: re.compile(_STATED),
    6: re.compile(r"\b([A-D])\b"),
    7: re.compile(r"([A-D])\."),
}


@dataclass(frozen=True)
class Answer:
    """One item of a prediction file.

    Attributes:
        key: of the item in its file.
        choice: the option chosen, None for no answer.
        rule: the one that found it, None for no answer.
    """

    key: str
    prompt: str
    prediction: str
    gold: str
    choice: str | None
    rule: int | None

    @property
    def right(self) -> bool:
        """Whether the option chosen is the right one."""
        return self.choice == self.gold


def choose(prediction: str, prompt: str) -> tuple[str | None, int | None]:
    """(option, rule that found it) by the benchmark's published rules; (None, None) for no answer.

    The first that fires on the stripped text wins:
    1. the whole text has exactly one character whose upper case is A to D (a full-width letter has none of them);
    2. a conclusion word, within 20 characters an answer word, within 10 是, then the first letter; lines do not matter;
    3. at the start, after 。 or a line break, possibly after Latin letters and spaces: an answer word, within 10
       characters 是, 为, 為 or an ASCII colon, within 10 a letter;
    4. at the start, after 。 or a line break: a letter followed by 是, 为, 為, an ASCII colon or 。;
    5. as 3, anywhere;
    6. the first letter that is a word of its own (a Chinese character next to it makes it part of one);
    7. a letter followed by a full stop;
    8. the option of the prompt whose text is most like the prediction in lower case: Levenshtein ratio with a
       substitution counted as two edits, the first of equals; none when no option has a character in common with it.
    In 2, 3 and 5 the letter ends a word; 2 and 3 ignore case.
    """
    text = prediction.strip()
    letters = [character.upper() for character in text if character.upper() in tuple(OPTIONS)]
    if len(letters) == 1:
        return letters[0], 1
    for rule, pattern in _PATTERNS.items():
        if match := pattern.search(text):
            return match[1].upper(), rule
    likeness = {letter: Indel.normalized_similarity(option, text.lower())
                for letter, option in options_shown(prompt).items()}  # fmt: skip
    best = max(likeness, key=lambda letter: likeness[letter], default=None)
    if not text or best is None or likeness[best] == 0:
        return None, None
    return best, 8


def options_shown(prompt: str) -> dict[str, str]:
    """Letter -> text of the `A. ...` lines of a prompt, A first; of a prompt with examples, those of its last question,
    which is the one asked."""
    shown = {match[1]: match[2].strip() for match in _OPTION_LINE.finditer(prompt)}
    return dict(sorted(shown.items()))


def read_answers(path: Path) -> list[Answer]:
    """The items of one prediction file, in its order.

    Raises:
        UserError: not of the benchmark's format, or a right answer that is none of A to D, naming file and item.
    """
    items = read_json(path)
    if not isinstance(items, dict) or not items:
        raise UserError(f'{path} holds no items; expected {{"0": {{origin_prompt, prediction, gold}}, ...}}')
    return [_answer(path, key, item) for key, item in items.items()]


def _answer(path: Path, key: str, item: Any) -> Answer:
    if not isinstance(item, dict):
        raise UserError(f"{path}, item {key}: expected {{origin_prompt, prediction, gold}}, got {item!r:.60}")
    prompt, prediction, gold = (item.get(name) for name in ("origin_prompt", "prediction", "gold"))
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        prompt = _joined(turn.get("prompt") for turn in prompt)
    if isinstance(prediction, list) and len(prediction) == 1:
        prediction = prediction[0]
    if not isinstance(prompt, str):
        raise UserError(f"{path}, item {key}: origin_prompt is neither a string nor a list of {{role, prompt}}")
    if not isinstance(prediction, str):
        raise UserError(f"{path}, item {key}: prediction is neither a string nor a list of one string")
    if gold not in tuple(OPTIONS):
        raise UserError(f"{path}, item {key}: gold is {gold!r}, expected one of A, B, C, D; correct the file")
    return Answer(key, prompt, prediction, gold, *choose(prediction, prompt))


def _joined(turns: Iterable[Any]) -> str | None:
    """The turns of a prompt as one text; None when one of them has none."""
    texts = list(turns)
    return "\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else None
