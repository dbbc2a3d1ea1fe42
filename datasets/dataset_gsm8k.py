"""GSM8K (openai/gsm8k): grade-school mathematics, a question and an answer worked out in steps.

Each answer ends with a line `#### ` and the number. It is kept: benchmarks find a model's number by it, so the model
that is fine-tuned on these rows has to write it. The paper takes a smaller regularisation of Q for this data.
"""

from typing import Any

EPSILON = 0.03


def question_and_answer(record: dict[str, Any]) -> dict[str, Any] | None:
    """The two columns of a record; None for a record whose answer does not end with its number.

    An empty answer is kept: rows without a text are counted and left out for every data set alike.
    """
    if record["answer"].strip() and not record["answer"].rpartition("\n")[2].startswith("#### "):
        return None
    return {"question": record["question"], "answer": record["answer"]}
