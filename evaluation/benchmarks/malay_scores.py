"""The score of a model on MalayMMLU: by its first token and by its full answer, as the benchmark's own evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.batching import token_batches
from core.files import digest_of, read_json, write_json
from core.progress import Progress
from core.texts.tokens import DATE_STRING, tokenized
from evaluation.benchmarks.malay_mmlu import LETTERS, Form, Question, data_file, is_llama, read_questions
from evaluation.benchmarks.option_scores import encode, letter_ids, option_scores
from evaluation.benchmarks.prompts import CHAT, POLICY_NAMES, PromptSettings, chat_template
from evaluation.evaluated_model import EvaluatedModel, check_finite, finite_answers, sha256_of
from evaluation.runner import Scoring
from evaluation.scores import Score, finished, write_score

log = logging.getLogger(__name__)
# Questions of one chunk. A finished chunk is on disk, and no batch crosses a chunk, so that a resumed run has the same
# batches as one that was never interrupted.
CHUNK = 256
METRICS = ("first_token", "full_answer")


def score_malay_mmlu(
    scoring: Scoring, data_dir: Path | None, shots: int = 0, prompts: PromptSettings | None = None
) -> Path:
    """Score a model and write its file, `malay_mmlu.json` or `malay_mmlu_<shots>shot.json`; returns the path.

    What is finished for the same inputs is not done again, and a run that was killed continues with its next chunk.

    Args:
        data_dir: folder of the benchmark's files; None for `data` in the clone at $MALAY_REPO.
        shots: solved examples in the prompt, 0 to 3.
        prompts: by default the chat template, and "llama" by the model's name.
    Raises:
        UserError: no data, data of another schema, a model without a chat template, answers longer than the model's
            positions, log-probabilities that are not finite.
    """
    model, prompts = scoring.model, prompts or PromptSettings()
    llama, why = is_llama(prompts, model)
    form = Form(shots, prompts.policy, llama)
    source = data_file(data_dir, shots)
    questions = read_questions(source, form.column, scoring.limit)
    benchmark = f"malay_mmlu_{shots}shot" if shots else "malay_mmlu"
    date = DATE_STRING if form.policy == CHAT else None
    inputs = {
        "benchmark": benchmark,
        "model": model.identity,
        "limit": scoring.limit,
        "settings": {"shots": shots, "prompt": form.policy, "llama_name": form.llama, "date": date},
        "data": sha256_of(source),
    }
    path, partial = (scoring.output_dir / f"{benchmark}{ending}" for ending in (".json", ".partial.json"))
    if finished(path, inputs):
        partial.unlink(missing_ok=True)  # of a run that was killed right after it had written the score
        return path
    if form.policy == CHAT:
        chat_template(model)
    with finite_answers(model, benchmark):
        chunks = _chunks(scoring, questions, form, partial, inputs)
    ids = [str(number) for number in range(1, len(questions) + 1)]
    metrics = {metric: [value for chunk in chunks for value in chunk[metric]] for metric in METRICS}
    categories = [question.category for question in questions]
    details = {**_details(model, form, questions, chunks), "llama_name": why}
    write_score(path, Score(benchmark, ids, metrics, categories, details, metric="first_token"), inputs)
    partial.unlink()
    return path


def _details(
    model: EvaluatedModel, form: Form, questions: Sequence[Question], chunks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How the questions were asked, for the reader of the score; the log says how many prompts were cut."""
    cut = sum(chunk["cut"] for chunk in chunks)
    if cut:
        message = "%d of %d prompts are longer than the model's positions: their beginning was cut"
        log.warning(message, cut, len(questions))
    prompt = form.prompt(model.tokenizer, questions[0])
    first = tokenized(model.tokenizer, prompt)["input_ids"][:2]
    return {
        "shots": form.shots,
        "prompt_policy": POLICY_NAMES[form.policy],
        "asked_as_llama": form.llama,
        "template_date": DATE_STRING if form.policy == CHAT else None,
        "prompt": prompt,
        # As in the benchmark: the template has the special token that begins a text, and the tokenizer adds another.
        "begins_with_two_special_tokens": first == [model.tokenizer.bos_token_id] * 2,
        "cut_prompts": cut,
        "first_token": "letter with the largest logit after the prompt",
        "full_answer": "option with the highest mean log-probability over all tokens of prompt + option but the first",
    }


def _chunks(
    scoring: Scoring, questions: list[Question], form: Form, partial: Path, inputs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The results of all chunks, in order; those that `partial` has for the same inputs are not computed again.

    No score depends on the batches, but a resumed run keeps to the batch size of the chunks that are there.
    """
    fingerprint = digest_of({**inputs, "tokens_per_batch": scoring.tokens_per_batch})
    record = read_json(partial) if partial.is_file() else {}
    if record.get("fingerprint") != fingerprint:
        record = {"fingerprint": fingerprint, "chunks": []}
    done = min(len(record["chunks"]) * CHUNK, len(questions))
    if done:
        log.info("continuing after %d of %d questions", done, len(questions))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with Progress(total=len(questions), initial=done, desc="MalayMMLU", unit="questions") as bar:
        for start in range(len(record["chunks"]) * CHUNK, len(questions), CHUNK):
            chunk = dict(list(enumerate(questions, 1))[start : start + CHUNK])
            record["chunks"].append(_score(scoring, chunk, form, bar))
            write_json(partial, record)
    return record["chunks"]


def _score(scoring: Scoring, questions: Mapping[int, Question], form: Form, bar: Progress) -> dict[str, Any]:
    """The result of one chunk: {metric: 0 or 1 for every question, "cut": number of prompts that were cut}.

    Args:
        questions: by their number in the file.
    """
    model, tokenizer = scoring.model.loaded, scoring.model.tokenizer
    letters = letter_ids(tokenizer, LETTERS)
    positions = model.config.get_text_config().max_position_embeddings
    numbers = list(questions)
    encoded = [encode(tokenizer, form.prompt(tokenizer, q), q.options, positions) for q in questions.values()]
    right: dict[str, list[int]] = {metric: [0] * len(questions) for metric in METRICS}
    for batch in token_batches([question.tokens for question in encoded], scoring.tokens_per_batch):
        found = option_scores(model, scoring.model.checkpoint.layout, [encoded[n] for n in batch], letters)
        for n, scores in zip(batch, found, strict=True):
            for metric, values in zip(METRICS, scores, strict=True):
                check_finite(values, f"question {numbers[n]}")
                # Of equal values the first counts, as in the benchmark's argmax.
                right[metric][n] = int(values.index(max(values)) == questions[numbers[n]].key)
        bar.update(len(batch))
    return {**right, "cut": sum(question.cut for question in encoded)}
