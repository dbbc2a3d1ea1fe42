"""Generated benchmark files: a few items of every benchmark, in the layout of its original release."""

import csv
import json
import random
from pathlib import Path

LETTERS = "ABCD"
SUBJECTS = ("anatomy", "business_ethics")


def write_benchmarks(folder: Path) -> Path:
    """Write the files below `folder`, which is returned."""
    rng = random.Random(0)

    def words(count):
        return " ".join(rng.choices('plan cost row weight model, ภาษา 語言 None 12 "quoted" it\'s'.split(), k=count))

    def write(path, text):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")

    def lines(path, rows):
        write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def options(names):
        return {name: words(3) + str(number) for number, name in enumerate(names)}

    for language in ("eng_Latn", "tha_Thai"):
        lines(
            f"belebele/{language}.jsonl",
            [
                {
                    "idx": n,
                    "flores_passage": words(9),
                    "question": words(5) + " ",
                    "correct_answer_num": str(n % 4 + 1),
                    "dialect": language,
                    **options(("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")),
                }
                for n in range(6)
            ],
        )
    for language, end in (("id", "."), ("th", "")):
        for split in ("test", "val"):
            lines(
                f"xcopa/{language}/{split}.{language}.jsonl",
                [
                    {
                        "premise": words(6) + "ก" + end,
                        "question": ("cause", "effect")[n % 2],
                        "label": n % 2,
                        "idx": n,
                        "changed": False,
                        **options(("choice1", "choice2")),
                    }
                    for n in range(4)
                ],
            )
    for subject in SUBJECTS:
        for split, count in (("test", 6), ("dev", 5)):
            path = folder / f"mmlu/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8", newline="") as handle:
                for n in range(count):
                    question = words(6) + (",\nsecond line" if n == 1 else "")
                    csv.writer(handle, lineterminator="\n").writerow(
                        [question, *options(LETTERS).values(), LETTERS[n % 4]]
                    )
        lines(
            f"global_mmlu/ms/global_mmlu_{subject}_ms_test.jsonl",
            [
                {
                    "id": n,
                    "label": LETTERS[(n + 1) % 4],
                    "metadata": {"sample_id": f"{subject}/test/{n}", "subject": subject},
                    "prompts": [{"question": words(5), **options([f"option_{letter}" for letter in "abcd"])}],
                }
                for n in range(6)
            ],
        )

    def asked(n, letters):
        choices = [{"text": text, "label": letter} for letter, text in options(letters).items()]
        return {
            "id": str(n),
            "answerKey": letters[n % len(letters)],
            "question": {"stem": words(5), "question_concept": "plan", "choices": choices},
        }

    for split in ("Test", "Dev"):
        lines(f"arc_easy/ARC-Easy-{split}.jsonl", [asked(n, ("ABCD", "1234", "ABC")[n % 3]) for n in range(5)])
    lines("commonsense_qa/dev_rand_split.jsonl", [asked(n, "ABCDE") for n in range(4)])
    lines("piqa/valid.jsonl", [{"goal": words(4), **options(("sol1", "sol2"))} for _ in range(4)])
    write("piqa/valid-labels.lst", "0\n1\n1\n0\n")
    lines(
        "winogrande/dev.jsonl",
        [
            {"sentence": words(3) + " _ " + words(4), "answer": str(n % 2 + 1), **options(("option1", "option2"))}
            for n in range(4)
        ],
    )
    write("winogrande/dev-labels.lst", "1\n2\n1\n2\n")
    lines(
        "medqa/phrases_no_exclude_test.jsonl",
        [
            {"question": words(6), "options": choices, "answer_idx": LETTERS[n % 4], "answer": choices[LETTERS[n % 4]]}
            for n in range(4)
            for choices in [options(LETTERS)]
        ],
    )
    for language in ("en", "th"):
        write(f"mgsm/mgsm_{language}.tsv", "".join(f"{words(5)}\t{n}\n" for n in ("3", "1,200", "-4")))
    exemplars = {
        str(n): {"q": f"Question: {words(3)}", "a": f"Step-by-Step Answer: The answer is {n}."} for n in range(1, 9)
    }
    write("mgsm/exemplars_th_en.json", json.dumps({"en": exemplars, "th": exemplars}))
    for subject in ("arts", "security_study"):
        rows = [{"question": words(4), **options(LETTERS), "answer": LETTERS[n % 4], "no": str(n)} for n in range(4)]
        if subject == "security_study":
            del rows[2]["A"]
        write(f"yue_benchmark/Yue-MMLU/{subject}.json", json.dumps(rows, ensure_ascii=False))
    return folder
