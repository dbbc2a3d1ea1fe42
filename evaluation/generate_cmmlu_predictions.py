"""Let a chat model answer Yue-MMLU, in the benchmark's own format, and score the answers by its rules.

    python evaluation/generate_cmmlu_predictions.py --model MODEL --output_dir DIR [--predictions_dir DIR] [--shots 5]

Questions come from $YUE_BENCHMARK_ROOT or --data_dir. Writes PREDICTIONS/NAME/cmmlu-yue-SUBJECT-Nshot.json, which
evaluate_cmmlu_yue.py reads, and OUTPUT/yue_mmlu.json, the score of every item. A subject that is finished for the same
model, questions and settings is not asked again; `manifest.json` beside the predictions says what each was made from.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm.auto import tqdm

from core.errors import UserError
from core.files import MANIFEST, digest_of, read_json, write_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.generation import Decoding, answers
from evaluation.benchmarks.prompts import CHAT, POLICY_NAMES, asking_flags, chat_template
from evaluation.benchmarks.yue_answers import read_answers
from evaluation.benchmarks.yue_mmlu import (
    MOST_SHOTS,
    ROOT_VARIABLE,
    category_of,
    prompt,
    question_folder,
    read_questions,
)
from evaluation.scores import Evaluated, Score, finished, finite, runner_flags, write_score

log = logging.getLogger("yue_mmlu")
# Subject -> item of the file -> (prompt, right answer).
Asked = dict[str, dict[str, tuple[str, str]]]


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = runner_flags((__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help=f"the SUBJECT.json (default: those in ${ROOT_VARIABLE})")
    parser.add_argument("--predictions-dir", type=Path, help="default: predictions, in the output folder")
    parser.add_argument("--name", help="folder of the predictions (default: the model as given, / as --)")
    parser.add_argument(
        "--shots", type=int, default=0, choices=range(MOST_SHOTS + 1), help="examples before each question (default 0)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0 (default 0)")
    asking_flags(parser, llama_name=False)
    given = parser.parse(argv)
    decoding = Decoding(
        given["max_new_tokens"], given["temperature"], given["seed"], given["tokens_per_batch"], given["prompt"]
    )
    output: Path = given["output_dir"]
    data_dir = question_folder(given["data_dir"])
    evaluated = Evaluated.from_flags(given)
    hold(output)
    path = run(
        evaluated, data_dir, output, given["limit"], given["shots"], decoding, given["predictions_dir"], given["name"]
    )
    record = read_json(path)
    parts = {**record["groups"], "overall": record["metrics"]}
    print(f"yue_mmlu, {record['details']['prompt_policy']}")
    print(
        "\n".join(f"{name:16}{100 * part['acc']['value']:7.2f} % of {part['acc']['n']}" for name, part in parts.items())
    )


def run(
    evaluated: Evaluated,
    data_dir: Path,
    output_dir: Path,
    limit: int | None = None,
    shots: int = 0,
    decoding: Decoding | None = None,
    predictions_dir: Path | None = None,
    name: str | None = None,
) -> Path:
    """Ask, score, and write `<output_dir>/yue_mmlu.json` (metric `acc`, groups are the categories); returns its path.

    Args:
        data_dir: holds SUBJECT.json.
        limit: the first so many questions of every subject; examples still come from the whole file.
        decoding: default greedy, 32 new tokens.
        predictions_dir, name: answers go to `<predictions_dir>/<name>`; default `<output_dir>/predictions` and
            `model_name`. Where one of them is given, the answers are made even if the score is there already.
    Raises:
        UserError: bad questions, a model without a chat template, predictions there that are not ours.
    """
    decoding = decoding or Decoding()
    asked = questions(data_dir, limit, shots)
    template = None
    if decoding.prompt == CHAT:
        template = hashlib.sha256(chat_template(evaluated).encode()).hexdigest()
    inputs = {
        "model": evaluated.identity,
        "template": template,
        "data": digest_of(asked),
        "limit": limit,
        "shots": shots,
        "decoding": decoding.inputs,
    }
    path = output_dir / "yue_mmlu.json"
    done = finished(path, inputs)
    folder = (predictions_dir or output_dir / "predictions") / (name or model_name(evaluated))
    if not done or predictions_dir or name:
        generate(evaluated, asked, folder, shots, decoding, template)
    if not done:
        write_score(path, score(folder, asked, shots, decoding), inputs)
    return path


def model_name(evaluated: Evaluated) -> str:
    """The model as it was given, as one folder name: two models of a table never share one."""
    return "--".join(part for part in Path(evaluated.checkpoint.name).parts if part.strip("/.")) or "model"


def questions(data_dir: Path, limit: int | None, shots: int) -> Asked:
    """What is asked. Raises UserError as `read_questions` and `prompt`."""
    asked: Asked = {}
    for path in sorted(data_dir.glob("*.json")):
        found = read_questions(path)
        asked[path.stem] = {
            str(place): (prompt(path.stem, found, place, shots), found[place].answer) for place in list(found)[:limit]
        }
    return asked


def file_name(subject: str, shots: int) -> str:
    """The benchmark's name for a file of predictions."""
    return f"cmmlu-yue-{subject}-{shots}shot.json"


def generate(
    evaluated: Evaluated, asked: Asked, folder: Path, shots: int, decoding: Decoding, template: str | None
) -> None:
    """Write the file of every subject that is not there already for the same inputs.

    The manifest holds, by file, the digest of its inputs and that of its bytes: whatever was killed between the two, a
    file is taken for finished only when it is the one that these inputs gave.

    Raises:
        UserError: a file of that name that the manifest does not know.
    """
    hold(folder)
    record_path = folder / MANIFEST
    record: dict[str, Any] = read_json(record_path) if record_path.is_file() else {}
    made: dict[str, dict[str, str]] = record.get("files", {})
    fingerprints = {
        subject: digest_of(
            {"model": evaluated.identity, "template": template, "asked": items, "decoding": decoding.inputs}
        )
        for subject, items in asked.items()
    }
    missing = []
    for subject, fingerprint in fingerprints.items():
        path = folder / file_name(subject, shots)
        known = made.get(path.name)
        if path.is_file() and known is None:
            raise UserError(f"{path} was not made by this tool; give another --predictions-dir or --name")
        if not path.is_file() or known != {"fingerprint": fingerprint, "sha256": digest(path)}:
            missing.append(subject)
    if len(missing) < len(asked):
        log.info("%s: %d of %d subjects are finished already", folder, len(asked) - len(missing), len(asked))
    if not missing:
        return
    total = sum(len(asked[subject]) for subject in missing)
    _ = evaluated.model  # loaded before the clock starts
    start = time.perf_counter()
    with tqdm(total=total, desc=f"Yue-MMLU, {shots}-shot", unit="item") as bar:
        for subject in missing:
            items, path = asked[subject], folder / file_name(subject, shots)
            with finite(evaluated, f"Yue-MMLU, {subject}"):
                texts = answers(evaluated, [text for text, _ in items.values()], decoding, bar.update)
            # Known as ours before it is there: a run killed between the two may replace it.
            made[path.name] = {"fingerprint": fingerprints[subject], "sha256": ""}
            write_json(record_path, {"files": made})
            write_json(
                path,
                {
                    key: {"origin_prompt": [{"role": "HUMAN", "prompt": text}], "prediction": answer, "gold": gold}
                    for (key, (text, gold)), answer in zip(items.items(), texts, strict=True)
                },
            )
            made[path.name]["sha256"] = digest(path)
            write_json(record_path, {"files": made})
    log.info("%.2f items/s (%d items)", total / (time.perf_counter() - start), total)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def score(folder: Path, asked: Asked, shots: int, decoding: Decoding) -> Score:
    """The benchmark's score of the predictions in a folder, item by item."""
    found = {subject: read_answers(folder / file_name(subject, shots)) for subject in asked}
    items = [(subject, item) for subject, answered in found.items() for item in answered]
    first = next(iter(asked.values()))
    return Score(
        "yue_mmlu",
        [f"{subject}/{item.key}" for subject, item in items],
        {"acc": [float(item.right) for _, item in items]},
        [category_of(subject) for subject, _ in items],
        {
            "shots": shots,
            "prompt": next(iter(first.values()))[0],
            "prompt_policy": POLICY_NAMES[decoding.prompt],
            "decoding": decoding.inputs,
            "subjects": {
                subject: sum(item.right for item in answered) / len(answered) for subject, answered in found.items()
            },
            "unanswered": sum(item.choice is None for _, item in items),
            "source": "Yue-MMLU of jiangjyjy/Yue-Benchmark (MIT), data/latest_data; answers chosen by its own rules",
        },
        metric="acc",
    )


if __name__ == "__main__":
    run_command(main)
