#!/usr/bin/env python
"""MalayMMLU of a checkpoint, asked as its own evaluation asks: accuracy by first token and by full answer."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm.auto import tqdm

from core.batching import token_batches
from core.files import digest_of, read_json, write_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from core.texts.tokens import DATE_STRING, tokenized
from evaluation.benchmarks.malay_mmlu import LETTERS, Form, Question, data_file, read_questions
from evaluation.benchmarks.option_scores import encode, letter_ids, option_scores
from evaluation.benchmarks.prompts import CHAT, POLICY_NAMES, Asking, asking_flags, chat_template, is_llama
from evaluation.scores import Evaluated, Score, check_finite, finished, finite, runner_flags, write_score

log = logging.getLogger("malay_mmlu")
# Questions between two writes of what is done; batches never cross them, so that a resumed run has the same ones.
CHUNK = 256
METRICS = ("first_token", "full_answer")


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = runner_flags(__doc__ or "")
    parser.add_argument("--data-dir", type=Path, help="folder of MalayMMLU_<N>shot.json (default $MALAY_REPO/data)")
    parser.add_argument("--shots", type=int, default=0, help="examples in the prompt, 0 to 3 (default 0)")
    asking_flags(parser, llama_name=True)
    given = parser.parse(argv)
    asking = Asking(given["prompt"], given["llama_name"])
    options = (given["limit"], given["shots"], given["tokens_per_batch"], asking)
    evaluated = Evaluated.from_flags(given)
    hold(given["output_dir"])
    path = run(evaluated, given["data_dir"], given["output_dir"], *options)
    print(table(read_json(path)))


def run(
    evaluated: Evaluated,
    data_dir: Path | None,
    output_dir: Path,
    limit: int | None,
    shots: int = 0,
    tokens_per_batch: int = 4096,
    asking: Asking | None = None,
) -> Path:
    """Score a model on MalayMMLU. What is finished is not done again; a killed run continues with its next chunk.

    Args:
        data_dir: folder of the files; None: `data` in the clone at $MALAY_REPO.
        limit: only the first questions of the file; None: all.
        shots: examples in the prompt, 0 to 3.
        tokens_per_batch: of the questions with each of their options, padding included.
        asking: how the model is asked; default in its chat template, "llama" by its name.
    Returns:
        the benchmark's file, `malay_mmlu.json` or `malay_mmlu_<shots>shot.json`.
    Raises:
        UserError: no data, data of another schema, a model without chat template, answers longer than
            the model's positions, log-probabilities that are not finite.
    """
    asking = asking or Asking()
    llama, why = is_llama(asking, evaluated)
    form = Form(shots, asking.policy, llama)
    source = data_file(data_dir, shots)
    questions = read_questions(source, form.column, limit)
    benchmark = f"malay_mmlu_{shots}shot" if shots else "malay_mmlu"
    date = DATE_STRING if form.policy == CHAT else None
    settings = {"shots": shots, "prompt": form.policy, "llama_name": form.llama, "date": date}
    data = hashlib.sha256(source.read_bytes()).hexdigest()
    inputs = {"benchmark": benchmark, "model": evaluated.identity, "limit": limit, "settings": settings, "data": data}
    path, partial = (output_dir / f"{benchmark}{ending}" for ending in (".json", ".partial.json"))
    if finished(path, inputs):
        partial.unlink(missing_ok=True)  # of a run that was killed after it had written the score
        return path
    if form.policy == CHAT:
        chat_template(evaluated)
    with finite(evaluated, benchmark):
        # No score depends on the batches, but a killed run goes on with the same ones.
        done = _chunks(evaluated, questions, form, partial, {**inputs, "tokens_per_batch": tokens_per_batch})
    details = {**_details(evaluated, form, questions, done), "llama_name": why}
    ids = [str(number) for number in range(1, len(questions) + 1)]
    metrics = {metric: [value for chunk in done for value in chunk[metric]] for metric in METRICS}
    categories = [question.category for question in questions]
    write_score(path, Score(benchmark, ids, metrics, categories, details, metric="first_token"), inputs)
    partial.unlink()
    return path


def _details(
    evaluated: Evaluated, form: Form, questions: Sequence[Question], done: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How the questions were asked, for the reader of the score; says in the log how many prompts were cut."""
    cut = sum(chunk["cut"] for chunk in done)
    if cut:
        told = "%d of %d prompts are longer than the model's positions: their beginning was cut"
        log.warning(told, cut, len(questions))
    tokenizer = evaluated.tokenizer
    prompt = form.prompt(tokenizer, questions[0])
    first = tokenized(tokenizer, prompt)["input_ids"][:2]
    return {
        "shots": form.shots,
        "prompt_policy": POLICY_NAMES[form.policy],
        "asked_as_llama": form.llama,
        "template_date": DATE_STRING if form.policy == CHAT else None,
        "prompt": prompt,
        # As in the benchmark: the template has the special token, and the tokenizer adds its own.
        "begins_with_two_special_tokens": first == [tokenizer.bos_token_id] * 2,
        "cut_prompts": cut,
        "first_token": "letter with the largest logit after the prompt",
        "full_answer": "option with the highest mean log-probability over all tokens of prompt + option but the first",
    }


def _chunks(
    evaluated: Evaluated, questions: list[Question], form: Form, partial: Path, inputs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Results of all chunks, in order; those in `partial` are taken from there when they were made from `inputs`."""
    fingerprint = digest_of(inputs)
    record = read_json(partial) if partial.is_file() else {}
    if record.get("fingerprint") != fingerprint:
        record = {"fingerprint": fingerprint, "chunks": []}
    done = record["chunks"]
    begin = len(done) * CHUNK
    if begin:
        log.info("continuing after %d of %d questions", min(begin, len(questions)), len(questions))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(questions), initial=min(begin, len(questions)), desc="MalayMMLU", unit="question") as bar:
        for start in range(begin, len(questions), CHUNK):
            chunk = dict(list(enumerate(questions, 1))[start : start + CHUNK])
            done.append(_score(evaluated, chunk, form, inputs["tokens_per_batch"], bar))
            write_json(partial, record)
    return done


def _score(
    evaluated: Evaluated, questions: Mapping[int, Question], form: Form, tokens_per_batch: int, bar: tqdm
) -> dict[str, Any]:
    """{metric: 0 or 1 for every question, "cut": prompts that were cut} of one chunk; `questions` by their number."""
    model, tokenizer = evaluated.model, evaluated.tokenizer
    letters = letter_ids(tokenizer, LETTERS)
    positions = model.config.get_text_config().max_position_embeddings
    numbers = list(questions)
    encoded = [encode(tokenizer, form.prompt(tokenizer, q), q.options, positions) for q in questions.values()]
    out: dict[str, list[int]] = {metric: [0] * len(questions) for metric in METRICS}
    for batch in token_batches([question.tokens for question in encoded], tokens_per_batch):
        found = option_scores(model, evaluated.checkpoint.layout, [encoded[n] for n in batch], letters)
        for n, scores in zip(batch, found, strict=True):
            for metric, values in zip(METRICS, scores, strict=True):
                check_finite(values, f"question {numbers[n]}")
                # Of equals the first, as the benchmark's arg max takes it.
                out[metric][n] = int(values.index(max(values)) == questions[numbers[n]].key)
        bar.update(len(batch))
    return {**out, "cut": sum(question.cut for question in encoded)}


def table(record: Mapping[str, Any]) -> str:
    """The table by category of a finished file, with the micro average and the mean of the categories."""
    groups = record["groups"]
    n_all = record["metrics"][METRICS[0]]["n"]
    rows = [
        (name, group[METRICS[0]]["n"], [group[metric]["value"] for metric in METRICS]) for name, group in groups.items()
    ]
    means = [sum(values[metric] for _, _, values in rows) / len(rows) for metric in range(len(METRICS))]
    rows.append(("micro average", n_all, [record["metrics"][metric]["value"] for metric in METRICS]))
    rows.append(("mean of categories", n_all, means))
    width = max(len(name) for name, _, _ in rows)
    policy = record["details"]["prompt_policy"]
    lines = [f"{record['benchmark']}, accuracy in %, {policy}", f"{'category':{width}} {'n':>6}  {'  '.join(METRICS)}"]
    for name, n, values in rows:
        lines.append(f"{name:{width}} {n:6}  {100 * values[0]:11.2f}  {100 * values[1]:11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
