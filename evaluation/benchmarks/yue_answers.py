"""Prediction files of Yue-MMLU: their format, and which option a prediction chooses by the benchmark's own rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Indel

from core.errors import UserError
from core.files import read_json
from evaluation.benchmarks.yue_mmlu import OPTIONS

FILE_NAME = re.compile(r"cmmlu-yue-(?P<subject>.+)-(?P<shots>\d+)shot\.json")
_CONCLUSION = "(?:因此|所以|综上所述|总之|故|結論是|結論)"
_ANSWER = "(?:答案|選擇|选择|选项|字母|標准答案|正确答案)"
_STATED = _ANSWER + r".{0,10}?[是为為:].{0,10}?([A-D])\b"
_START = r"(?:^|。|\n)"
# An option of the prompt: its text ends before the next line that begins with an option or with 答案:, or at the end.
_OPTION = re.compile(r"([A-D])\.\s*(.+?)(?=\n[A-D]\.|\n答案:|\Z)", re.DOTALL)
_SHOWN = re.compile(r"[A-D]\. .")
# Rules 2 to 6, in the order in which they are tried; each matches as far left as it can, and then the nearest words.
_PATTERNS = {
    2: re.compile(rf"{_CONCLUSION}.{{0,20}}?{_ANSWER}.{{0,10}}?是[^ABCD]*?([A-D])\b", re.IGNORECASE | re.DOTALL),
    3: re.compile(rf"{_START}[A-D\s]*{_STATED}", re.IGNORECASE),
    4: re.compile(rf"{_START}\s*([A-D])\s*[是为為:。]"),
    5: re.compile(_STATED, re.IGNORECASE),
    6: re.compile(r"\b([A-D])\b"),
}


@dataclass(frozen=True)
class Answer:
    """One item of a prediction file.

    Attributes:
        key: of the item in its file.
        prompt: the last turn of the prompt.
        prediction: what the model answered.
        gold: the right option.
        choice: the option that was chosen; None for no answer.
        rule: number of the rule that found it (`choose`); None for no answer.
    """

    key: str
    prompt: str
    prediction: str
    gold: str
    choice: str | None
    rule: int | None

    @property
    def right(self) -> bool:
        """Whether the right option was chosen."""
        return self.choice == self.gold


def choose(prediction: str, prompt: str) -> tuple[str | None, int | None]:
    """(option, number of the rule that found it) by the benchmark's published rules; (None, None) for no answer.

    An empty prediction is no answer, but one of white space alone goes through all rules. The first rule that matches
    the stripped text decides:
    1. the whole text has exactly one character whose upper case is A to D (full-width letters do not count);
    2. a conclusion word, within 20 characters an answer word, within 10 是, then the first letter, across line breaks;
    3. at the start of the text, after 。 or a line break, where letters A to D and white space may come first: an
       answer word, within 10 characters 是, 为, 為 or an ASCII colon, within 10 a letter;
    4. at the start of the text, after 。 or a line break: a letter, which white space may surround, then 是, 为, 為, an
       ASCII colon or 。;
    5. as 3, anywhere in the text;
    6. the first letter that is a word of its own (a Chinese character next to it makes it part of a word);
    8. the option of the prompt whose text is most similar to the prediction, both in lower case: the Levenshtein ratio
       where a substitution counts as two edits. Of equal options the first is chosen, even when nothing is similar.
    In rules 2, 3 and 5 the letter has to end a word, and case does not matter. The benchmark's seventh rule (a letter
    and a full stop) matches nothing that the sixth does not match before it.
    """
    if not prediction:
        return None, None
    text = prediction.strip()
    letters = [character.upper() for character in text if character.upper() in tuple(OPTIONS)]
    if len(letters) == 1:
        return letters[0], 1
    for rule, pattern in _PATTERNS.items():
        if match := pattern.search(text):
            return match[1].upper(), rule
    options = options_shown(prompt)
    if not options:
        return None, None
    return max(options, key=lambda letter: Indel.normalized_similarity(text.lower(), options[letter].lower())), 8


def options_shown(prompt: str) -> dict[str, str]:
    """Letter -> text of the options in a prompt, in the order in which the letters first occur.

    An option begins with its letter and a full stop, anywhere in the text. A letter that occurs again, as in a prompt
    with examples, has its last text. The result is empty unless somewhere a letter, a full stop and a space are
    followed by a text.
    """
    if not _SHOWN.search(prompt):
        return {}
    return {match[1]: match[2].strip() for match in _OPTION.finditer(prompt)}


def read_answers(path: Path) -> list[Answer]:
    """The items of one prediction file, in its order.

    Raises:
        UserError: the file is not in the benchmark's format, or a right answer is none of A to D; names the item.
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
        prompt = prompt[-1].get("prompt") if prompt else None
    if isinstance(prediction, list) and len(prediction) == 1:
        prediction = prediction[0]
    if not isinstance(prompt, str):
        raise UserError(f"{path}, item {key}: origin_prompt is neither a string nor a list of {{role, prompt}}")
    if not isinstance(prediction, str):
        raise UserError(f"{path}, item {key}: prediction is neither a string nor a list of one string")
    if gold not in tuple(OPTIONS):
        raise UserError(f"{path}, item {key}: gold is {gold!r}, expected one of A, B, C, D; correct the file")
    return Answer(key, prompt, prediction, gold, *choose(prediction, prompt))
