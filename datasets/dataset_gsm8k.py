"""GSM8K (openai/gsm8k): grade-school mathematics, a question and an answer that is worked out in steps.

Each answer ends with a line `#### ` and the number. The line is kept, because benchmarks find a model's number by it,
so the model that is fine-tuned on these rows has to learn to write it.
"""

from typing import Any

# The paper takes a smaller entropic regularisation of Q for this data set than for the others.
EPSILON = 0.03


def question_and_answer(record: dict[str, Any]) -> dict[str, Any] | None:
    """The two columns of a record, or None for a record whose answer does not end with its number.

    A record with an empty answer is kept here, because rows without a text are counted and left out for every data set
    in the same place (`core.data`).
    """
    if record["answer"].strip() and not record["answer"].rpartition("\n")[2].startswith("#### "):
        return None
    return {"question": record["question"], "answer": record["answer"]}
