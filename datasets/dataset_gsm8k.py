"""GSM8K: grade-school mathematics, question and worked answer (MIT)."""

from typing import Any

HUB_ID = "openai/gsm8k"


def gsm8k() -> list[dict[str, Any]]:
    """Rows {"question", "answer"} of the train split, from the hub or its cache."""
    import datasets

    return list(datasets.load_dataset(HUB_ID, "main", split="train"))
