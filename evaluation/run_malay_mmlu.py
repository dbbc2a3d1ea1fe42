#!/usr/bin/env python
"""MalayMMLU of a checkpoint: accuracy by the first token (the benchmark's own) and by the full answer."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm.auto import tqdm

from core.activations import token_batches
from core.runs import UserError, digest_of, hold, outputs_held, read_json, run_command, setup_logging, write_json
from evaluation.malay_questions import LETTERS, Question, data_file, read_questions
from evaluation.option_scores import encode, letter_ids, option_scores
from evaluation.scores import Evaluated, Score, finished, runner_flags, write_score

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
    parser.add_argument("--chat-template", action="store_true",
                        help="the prompt is the user's message (default: read as it is)")  # fmt: skip
    given = parser.parse(argv)
    evaluated = Evaluated.from_flags(given)
    hold(given["output_dir"])
    path = run(evaluated, given["data_dir"], given["output_dir"], given["limit"], given["shots"],
               given["tokens_per_batch"], given["chat_template"])  # fmt: skip
    print(table(read_json(path)))


def run(
    evaluated: Evaluated,
    data_dir: Path | None,
    output_dir: Path,
    limit: int | None,
    shots: int = 0,
    tokens_per_batch: int = 4096,
    chat_template: bool = False,
) -> Path:
    """Score a model on MalayMMLU. What is finished is not done again; a killed run continues with its next chunk.

    Args:
        data_dir: folder of the files; None: `data` in the clone at $MALAY_REPO.
        limit: only the first questions of the file; None: all.
        shots: examples in the prompt, 0 to 3.
        tokens_per_batch: of the questions with each of their options, padding included.
        chat_template: whether the prompt is rendered as the user's message.
    Returns:
        the benchmark's file, `malay_mmlu.json` or `malay_mmlu_<shots>shot.json`.
    Raises:
        UserError: no data, data of another schema, a model without chat template, answers longer than
            the model's positions.
    """
    source = data_file(data_dir, shots)
    questions = read_questions(source, shots, limit)
    benchmark = f"malay_mmlu_{shots}shot" if shots else "malay_mmlu"
    settings = {"shots": shots, "chat_template": chat_template}
    inputs = {"benchmark": benchmark, "model": evaluated.identity, "limit": limit, "settings": settings,
              "data": hashlib.sha256(source.read_bytes()).hexdigest()}  # fmt: skip
    path = output_dir / f"{benchmark}.json"
    if finished(path, inputs):
        return path
    if chat_template and not evaluated.tokenizer.chat_template:
        raise UserError(f"{evaluated.checkpoint.name} has no chat template; leave out --chat-template, or give a model "
                        f"that has one")  # fmt: skip
    partial = output_dir / f"{benchmark}.partial.json"
    # No score depends on the batches, but a killed run goes on with the same ones.
    running = {**settings, "tokens_per_batch": tokens_per_batch}
    done = _chunks(evaluated, questions, partial, digest_of({**inputs, "settings": running}), running)
    cut = sum(chunk["cut"] for chunk in done)
    if cut:
        log.warning("%d of %d prompts are longer than the model's positions: their beginning was cut", cut,
                    len(questions))  # fmt: skip
    ids = [str(number) for number in range(1, len(questions) + 1)]
    metrics = {metric: [value for chunk in done for value in chunk[metric]] for metric in METRICS}
    details = {
        "shots": shots,
        "chat_template": chat_template,
        "cut_prompts": cut,
        "first_token": "letter with the most probable token after the prompt",
        "full_answer": "answer without its letter with the highest sum of log-probabilities after the prompt",
    }
    write_score(path, Score(benchmark, ids, metrics, [q.category for q in questions], details), inputs)
    partial.unlink()
    return path


def _chunks(
    evaluated: Evaluated, questions: list[Question], partial: Path, fingerprint: str, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Results of all chunks, in order; those in `partial` are taken from there when it has the same fingerprint."""
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
            done.append(_score(evaluated, questions[start : start + CHUNK], settings, bar))
            write_json(partial, record)
    return done


def _score(evaluated: Evaluated, questions: list[Question], settings: Mapping[str, Any], bar: tqdm) -> dict[str, Any]:
    """{metric: 0 or 1 for every question, "cut": prompts that were cut} of one chunk."""
    model, tokenizer = evaluated.model, evaluated.tokenizer
    letters = letter_ids(tokenizer, LETTERS)
    positions = model.config.get_text_config().max_position_embeddings
    encoded = [encode(tokenizer, q.prompt, q.options, settings["chat_template"], positions) for q in questions]
    out: dict[str, list[int]] = {metric: [0] * len(questions) for metric in METRICS}
    for batch in token_batches([question.tokens for question in encoded], settings["tokens_per_batch"]):
        found = option_scores(model, evaluated.checkpoint.layout, [encoded[n] for n in batch], letters)
        for n, scores in zip(batch, found, strict=True):
            for metric, values in zip(METRICS, scores, strict=True):
                out[metric][n] = int(values.index(max(values)) == questions[n].key)
        bar.update(len(batch))
    return {**out, "cut": sum(question.cut for question in encoded)}


def table(record: Mapping[str, Any]) -> str:
    """The table by category of a finished file, with the micro average and the mean of the categories."""
    groups = record["groups"]
    n_all = record["metrics"][METRICS[0]]["n"]
    rows = [(name, group[METRICS[0]]["n"], [group[metric]["value"] for metric in METRICS])
            for name, group in groups.items()]  # fmt: skip
    means = [sum(values[metric] for _, _, values in rows) / len(rows) for metric in range(len(METRICS))]
    rows.append(("micro average", n_all, [record["metrics"][metric]["value"] for metric in METRICS]))
    rows.append(("mean of categories", n_all, means))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{record['benchmark']}, accuracy in %", f"{'category':{width}} {'n':>6}  {'  '.join(METRICS)}"]
    for name, n, values in rows:
        lines.append(f"{name:{width}} {n:6}  {100 * values[0]:11.2f}  {100 * values[1]:11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
