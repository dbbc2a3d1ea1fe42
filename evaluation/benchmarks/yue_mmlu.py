"""Yue-MMLU (Jiang et al., 2024, How Far Can Cantonese NLP Go?): subjects, categories, question files, prompts.

22 subjects of CMMLU (Li et al., arXiv 2306.09212) in Cantonese, four options each.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.files import read_json

log = logging.getLogger(__name__)
OPTIONS = "ABCD"
MAX_SHOTS = 5
ROOT_VARIABLE = "YUE_BENCHMARK_ROOT"
IN_REPOSITORY = Path("data/latest_data/Yue-MMLU")
# Category -> subject -> its name in the benchmark's prompts.
CATEGORIES: dict[str, dict[str, str]] = {
    "humanities": {
        "arts": "藝術學",
        "chinese_literature": "中國文學",
        "philosophy": "哲學",
        "world_history": "世界歷史",
        "world_religions": "世界宗教",
    },
    "social science": {
        "economics": "經濟學",
        "education": "教育學",
        "ethnology": "民族學",
        "high_school_geography": "高中地理",
        "journalism": "新聞學",
        "management": "管理學",
        "marketing": "市場營銷",
        "marxist_theory": "馬克思主義理論",
        "professional_psychology": "專業心理學",
        "security_study": "安全研究",
        "sociology": "社會學",
    },
    "STEM": {"college_medicine": "大學醫學", "electrical_engineering": "電氣工程", "machine_learning": "機器學習"},
    "others": {"chinese_civil_service_exam": "中國公務員考試", "logical": "邏輯學", "sports_science": "體育學"},
}
NAMES = {subject: name for subjects in CATEGORIES.values() for subject, name in subjects.items()}
UNCATEGORISED = "uncategorised"


def category_of(subject: str) -> str:
    """The category of a subject; `uncategorised` for one that the benchmark does not have."""
    return next((category for category, subjects in CATEGORIES.items() if subject in subjects), UNCATEGORISED)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: of the question.
        options: the texts of A to D.
        answer: the right letter.
    """

    text: str
    options: tuple[str, ...]
    answer: str

    def shown(self) -> str:
        """The question and its options as the benchmark's prompts show them."""
        lines = [f"{letter}. {option}\n" for letter, option in zip(OPTIONS, self.options, strict=True)]
        return f"問題：{self.text}\n" + "".join(lines)


def question_folder(given: Path | None) -> Path:
    """The folder of question files: `given`, otherwise the one in the clone at $YUE_BENCHMARK_ROOT.

    Raises:
        UserError: neither is given, or the folder has no question files.
    """
    root = os.environ.get(ROOT_VARIABLE)
    if given is None and not root:
        raise UserError(
            f"no questions: set ${ROOT_VARIABLE} to a clone of Yue-Benchmark, put its folder Yue-MMLU into the folder "
            "yue_benchmark of BENCHMARK_DATA, or give it to --data-dir of evaluation/generate_cmmlu_predictions.py"
        )
    folder = given if given is not None else Path(root or "") / IN_REPOSITORY
    if not any(folder.glob("*.json")):
        where = "--data-dir" if given is not None else f"${ROOT_VARIABLE}"
        raise UserError(f"{folder} has no SUBJECT.json; point {where} at the benchmark's question files")
    return folder


def read_questions(path: Path) -> dict[int, Question]:
    """Number of the item in the file -> question.

    A question that lacks an option cannot be asked (the published security_study has one). It is left out, which the
    log says; the others keep their numbers.

    Raises:
        UserError: the file is not an array of {question, A, B, C, D, answer}; names the file and the item.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is not an array of questions; expected {{question, A, B, C, D, answer}} in each")
    found: dict[int, Question] = {}
    for number, row in enumerate(rows):
        good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("question", "answer"))
        if not good or any(not isinstance(row.get(letter, ""), str) for letter in OPTIONS):
            raise UserError(f"{path}, item {number}: expected strings in question, A, B, C, D and answer; correct it")
        if row["answer"] not in tuple(OPTIONS):
            raise UserError(f"{path}, item {number}: the answer is {row['answer']!r}, expected one of A, B, C, D")
        if any(letter not in row for letter in OPTIONS):
            log.warning("%s, item %d lacks an option: left out", path, number)
            continue
        found[number] = Question(row["question"], tuple(row[letter] for letter in OPTIONS), row["answer"])
    if not found:
        raise UserError(f"{path} has no question with all of A, B, C and D; take the published file")
    return found


def prompt(subject: str, questions: Mapping[int, Question], number: int, shots: int) -> str:
    """What the benchmark asks for one question.

    The solved examples are the `shots` questions before it in the file, and for the first questions of the file the
    last ones, as in the benchmark's published predictions. A question with the same text is never an example.

    Args:
        questions: number in the file -> question.
        number: of the question that is asked.
    Raises:
        UserError: the file has too few other questions.
    """
    asked = questions[number]
    name = NAMES.get(subject, subject.replace("_", " "))
    head = f"以下係關於{name}嘅單項選擇題，請直接畀出正確答案嘅選項，唔好輸出原因。\n{asked.shown()}"
    if not shots:
        return head
    numbers = list(questions)
    position = numbers.index(number)
    nearest_first = [questions[other] for other in reversed(numbers[position + 1 :] + numbers[:position])]
    examples = [example for example in nearest_first if example.text != asked.text][:shots]
    if len(examples) < shots:
        raise UserError(
            f"{subject} has {len(examples)} questions besides item {number}, expected {shots} for the "
            "examples; give fewer --shots"
        )
    shown = "".join(f"樣例：\n{example.shown()}回應：{example.answer}\n\n" for example in reversed(examples))
    return f"{shown}\n{head}答案："
