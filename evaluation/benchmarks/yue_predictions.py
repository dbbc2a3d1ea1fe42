"""Yue-MMLU by generated answers: prediction files in the benchmark's own format, and the score by its rules."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, digest_of, read_json, write_json
from core.locks import hold
from core.progress import Progress
from evaluation.benchmarks.generation import Decoding, answers
from evaluation.benchmarks.prompts import CHAT, POLICY_NAMES, chat_template
from evaluation.benchmarks.yue_answers import read_answers
from evaluation.benchmarks.yue_mmlu import category_of, prompt, read_questions
from evaluation.evaluated_model import EvaluatedModel, finite_answers, sha256_of
from evaluation.runner import Scoring
from evaluation.scores import Score, finished, write_score

log = logging.getLogger(__name__)
# Subject -> number of the item in its file -> (prompt, right answer).
Prompts = dict[str, dict[str, tuple[str, str]]]


def score_yue_mmlu(
    scoring: Scoring,
    data_dir: Path,
    shots: int = 0,
    decoding: Decoding | None = None,
    predictions_dir: Path | None = None,
    name: str | None = None,
) -> Path:
    """Let a model answer, score the answers, and write `yue_mmlu.json` (metric `acc`, by category); returns its path.

    What is finished for the same inputs is not done again.

    Args:
        data_dir: holds SUBJECT.json. The limit of `scoring` is per subject; examples still come from the whole file.
        shots: solved examples in the prompt.
        decoding: by default greedy, 32 new tokens.
        predictions_dir, name: answers go to `<predictions_dir>/<name>`, by default to `<output_dir>/predictions` and
            `model_name`. Where either is given, the answers are written even if the score is finished.
    Raises:
        UserError: bad questions, a model without a chat template, or prediction files that are not ours.
    """
    model, decoding = scoring.model, decoding or Decoding(tokens_per_batch=scoring.tokens_per_batch)
    prompts = read_prompts(data_dir, scoring.limit, shots)
    template = hashlib.sha256(chat_template(model).encode()).hexdigest() if decoding.prompt == CHAT else None
    made_from = {"model": model.identity, "template": template, "decoding": decoding.inputs}
    inputs = {
        "model": model.identity,
        "template": template,
        "data": digest_of(prompts),
        "limit": scoring.limit,
        "shots": shots,
        "decoding": decoding.inputs,
    }
    path = scoring.output_dir / "yue_mmlu.json"
    done = finished(path, inputs)
    folder = PredictionFolder(
        (predictions_dir or scoring.output_dir / "predictions") / (name or model_name(model)), shots
    )
    if not done or predictions_dir or name:
        hold(folder.path)
        fingerprints = {subject: digest_of({**made_from, "asked": items}) for subject, items in prompts.items()}
        if missing := folder.missing(fingerprints):
            predict(model, {subject: prompts[subject] for subject in missing}, decoding, folder, fingerprints)
    if not done:
        write_score(path, score_predictions(folder, prompts, decoding), inputs)
    return path


def model_name(model: EvaluatedModel) -> str:
    """The model as it was given, as the name of a folder: no two models of a table share one."""
    return "--".join(part for part in Path(model.checkpoint.name).parts if part.strip("/.")) or "model"


def read_prompts(data_dir: Path, limit: int | None, shots: int) -> Prompts:
    """What a model is asked in every subject. Raises UserError as `read_questions` and `prompt` do."""
    prompts: Prompts = {}
    for path in sorted(data_dir.glob("*.json")):
        questions = read_questions(path)
        prompts[path.stem] = {
            str(number): (prompt(path.stem, questions, number, shots), questions[number].answer)
            for number in list(questions)[:limit]
        }
    return prompts


class PredictionFolder:
    """A folder of prediction files, one per subject, and the manifest that says what each was made from.

    The manifest holds, by file, the fingerprint of its inputs and the digest of its bytes, so a file counts as finished
    only when it is the one that these inputs gave, wherever a run was killed.

    Attributes:
        path: of the folder.
        shots: solved examples in the prompts, which the names of the files contain.
    """

    def __init__(self, path: Path, shots: int):
        self.path, self.shots = path, shots

    def file(self, subject: str) -> Path:
        """The file of a subject, by the benchmark's own name for it."""
        return self.path / f"cmmlu-yue-{subject}-{self.shots}shot.json"

    def missing(self, fingerprints: Mapping[str, str]) -> list[str]:
        """The subjects that are not finished for these inputs; the log says how many are.

        Args:
            fingerprints: subject -> digest of everything that its predictions depend on.
        Raises:
            UserError: a file has the name of one of ours, but the manifest does not know it.
        """
        known, missing = self._known(), []
        for subject, fingerprint in fingerprints.items():
            file = self.file(subject)
            if file.is_file() and file.name not in known:
                raise UserError(f"{file} was not made by this tool; give another --predictions-dir or --name")
            if not file.is_file() or known[file.name] != {"fingerprint": fingerprint, "sha256": sha256_of(file)}:
                missing.append(subject)
        if done := len(fingerprints) - len(missing):
            log.info("%s: %d of %d subjects are finished already", self.path, done, len(fingerprints))
        return missing

    def write(self, subject: str, fingerprint: str, items: Mapping[str, tuple[str, str]], texts: Sequence[str]) -> None:
        """Write the answers (`texts`) to the prompts of a subject (`items`), and record them."""
        file = self.file(subject)
        # The file is known as ours before it exists, so that a run that is killed in between may replace it.
        self._record(file, fingerprint, "")
        write_json(
            file,
            {
                number: {"origin_prompt": [{"role": "HUMAN", "prompt": asked}], "prediction": text, "gold": gold}
                for (number, (asked, gold)), text in zip(items.items(), texts, strict=True)
            },
        )
        self._record(file, fingerprint, sha256_of(file))

    def _known(self) -> dict[str, dict[str, str]]:
        """Name of a file -> what the manifest says of it."""
        path = self.path / MANIFEST
        return read_json(path).get("files", {}) if path.is_file() else {}

    def _record(self, file: Path, fingerprint: str, sha256: str) -> None:
        files = self._known() | {file.name: {"fingerprint": fingerprint, "sha256": sha256}}
        write_json(self.path / MANIFEST, {"files": files})


def predict(
    model: EvaluatedModel,
    prompts: Prompts,
    decoding: Decoding,
    folder: PredictionFolder,
    fingerprints: Mapping[str, str],
) -> None:
    """Let the model answer, and write the prediction file of each subject as soon as it is finished."""
    total = sum(map(len, prompts.values()))
    _ = model.loaded  # before the clock starts
    start = time.perf_counter()
    with Progress(total=total, desc=f"Yue-MMLU, {folder.shots}-shot", unit="items") as bar:
        for subject, items in prompts.items():
            with finite_answers(model, f"Yue-MMLU, {subject}"):
                texts = answers(model, [asked for asked, _ in items.values()], decoding, bar.update)
            folder.write(subject, fingerprints[subject], items, texts)
    log.info("%.2f items/s (%d items)", total / (time.perf_counter() - start), total)


def score_predictions(folder: PredictionFolder, prompts: Prompts, decoding: Decoding) -> Score:
    """The benchmark's score of the predictions in a folder, item by item.

    Args:
        prompts: what was asked; the first prompt stands in the score's details.
        decoding: how the answers were generated, for the details.
    """
    by_subject: dict[str, list[Any]] = {subject: read_answers(folder.file(subject)) for subject in prompts}
    items = [(subject, answer) for subject, found in by_subject.items() for answer in found]
    first_subject = next(iter(prompts.values()))
    details = {
        "shots": folder.shots,
        "prompt": next(iter(first_subject.values()))[0],
        "prompt_policy": POLICY_NAMES[decoding.prompt],
        "decoding": decoding.inputs,
        "subjects": {
            subject: sum(answer.right for answer in found) / len(found) for subject, found in by_subject.items()
        },
        "unanswered": sum(answer.choice is None for _, answer in items),
        "source": "Yue-MMLU of jiangjyjy/Yue-Benchmark (MIT), data/latest_data; answers chosen by its own rules",
    }
    return Score(
        "yue_mmlu",
        [f"{subject}/{answer.key}" for subject, answer in items],
        {"acc": [float(answer.right) for _, answer in items]},
        [category_of(subject) for subject, _ in items],
        details,
        metric="acc",
    )
