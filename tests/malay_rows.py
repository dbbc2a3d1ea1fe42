"""Made-up rows of MalayMMLU's schema, and files of them."""

import json
import random

from conftest import sentences

from evaluation.benchmarks.malay_mmlu import LETTERS

CATEGORIES = ("Humanities", "Language", "Others", "STEM", "Social science")


def rows(count: int = 20, shots: int = 0) -> list[dict]:
    """Rows of the benchmark's schema, with 4 or 5 options.

    The prompts do not end in "Jawapan:". Options come as a list with letters, a list without, lines, and lines with
    blank lines between them.

    Args:
        shots: also write the columns with so many examples in the prompt.
    """
    rng = random.Random(shots)
    out = []
    for n, question in enumerate(sentences(count, 5)):
        texts = [answer.partition(" ")[2] for answer in sentences(4 + n % 2, n, 2 + n % 7)]
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
        prompt = question * (1 + n % 4) + "\n" + "\n".join(lettered)
        key = rng.choice(LETTERS[: len(texts)])
        row = {
            "prompt": prompt,
            "subject": f"subjek {n % 3}",
            "category": CATEGORIES[n % 5],
            "key": key,
            "options": (lettered, texts, "\n".join(lettered), "\n\n".join(lettered))[n % 4],
        }
        if shots:
            examples = "contoh Jawapan: A\n\n" * shots + prompt
            row |= {
                f"full_question_{shots}shot": f"{examples}\nJawapan:",
                f"full_question_{shots}shot_llama": f"{examples} (llama)",
            }
        out.append(row)
    return out


def write(folder, *given: dict, shots: int = 0):
    """Write rows to the benchmark's file in `folder`, which is returned."""
    (folder / f"MalayMMLU_{shots}shot.json").write_text(json.dumps(given, ensure_ascii=False), "utf-8")
    return folder
