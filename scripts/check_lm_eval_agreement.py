"""Our tasks on local data against the harness's own: the same prompts, the same answers, item by item.

The harness's task is built from its own definition alone. What it asks the hub for is answered from the same local
files, which `scripts/local_hub.py` reads by other code than our tasks do, and its model runs one request at a time.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from core.errors import UserError
from core.models.checkpoints import open_checkpoint
from core.progress import Progress
from core.runs.command_line import Parser
from core.runs.process import run_command, setup_logging
from core.runs.settings import check_device
from evaluation.benchmarks.harness import load_local, task_manager
from evaluation.benchmarks.harness_model import evaluate, language_model, set_shots
from evaluation.benchmarks.local_tasks import local_tasks
from evaluation.evaluated_model import EvaluatedModel
from scripts.local_hub import hub_of

log = logging.getLogger("agreement")
# Tasks that the harness does not have, so that there is nothing to agree with.
OURS = ("xcopa_id_whole", "xcopa_th_whole", "yue_mmlu_likelihood")
COUNTS = ("requests", "answers", "scores")


def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument("--model", required=True, help="folder, GGUF file, id in $MODELS_ROOT, or hub id")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of benchmark files")
    parser.add_argument("--tasks", help="names, with commas between (default: all that the data folder has)")
    parser.add_argument("--items", type=int, default=50, help="items of every task, drawn at random (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--num-fewshot", type=int, help="solved items before each item (default: the task's number)")
    parser.add_argument("--max-gen-toks", type=int, default=16, help="of tasks that generate (default 16)")
    parser.add_argument("--requests-only", action="store_true", help="compare what is asked, without the model")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    given = parser.parse(argv)
    known = [name for name in local_tasks() if not name.startswith(OURS)]
    names = given["tasks"].split(",") if given["tasks"] else known
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"{', '.join(unknown)} cannot be compared; known: {', '.join(known)}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    check_device(given["device"])
    model = EvaluatedModel(open_checkpoint(given["model"], device=given["device"]), "float32")
    lines, differing = [], 0
    with tempfile.TemporaryDirectory() as cache:
        for name in Progress(names, desc="tasks", unit="tasks"):
            task = local_tasks()[name]
            files = task.find(given["data_dir"])
            if files is None:
                lines.append(f"{name}: no local data")
                continue
            ours = load_local(task, files)
            with hub_of(given["data_dir"], cache):
                theirs = task_manager(task.folder).load(name)["tasks"][name]
            found = compare(ours, theirs, model, given)
            differing += sum(found[count] for count in COUNTS)
            lines.append(
                f"{name}: {found['items']} items of {found['of']}; differing requests {found['requests']}, "
                f"answers {found['answers']}, scores {found['scores']}"
                + (" (answers not computed)" if given["requests_only"] else "")
            )
            log.info(lines[-1])
    print("\n".join(lines))
    if differing:
        raise SystemExit(1)


def compare(ours: Any, theirs: Any, model: EvaluatedModel, given: Mapping[str, Any]) -> dict[str, int]:
    """How many of the drawn items differ in their requests, in the chosen answer, and in a score.

    Args:
        ours, theirs: the task on local rows, and the harness's own.
        given: the command's flags.
    Returns:
        {"items": drawn, "of": all, "requests", "answers", "scores": differing items}.
    """
    total = len(ours.eval_docs)
    if len(theirs.eval_docs) != total:
        raise UserError(f"{ours.config.task}: {total} items here, {len(theirs.eval_docs)} in the harness's own task")
    drawn = sorted(random.Random(given["seed"]).sample(range(total), min(given["items"], total)))
    for task in (ours, theirs):
        if task.config.generation_kwargs:
            task.set_config("generation_kwargs", {"max_gen_toks": given["max_gen_toks"]}, update=True)
    if given["requests_only"]:
        asked = [requests(task, drawn, given["num_fewshot"]) for task in (ours, theirs)]
        differing = {**dict.fromkeys(COUNTS, 0), "requests": sum(a != b for a, b in zip(*asked, strict=True))}
    else:
        lm = language_model(model.loaded, model.tokenizer, 4096)
        our_samples = evaluate(lm, ours, given["num_fewshot"], samples=drawn)["samples"]
        differing = differing_items(our_samples, their_samples(theirs, model, drawn, given["num_fewshot"]))
    return {"items": len(drawn), "of": total, **differing}


def their_samples(task: Any, model: EvaluatedModel, drawn: list[int], num_fewshot: int | None) -> list[Any]:
    """The samples that the harness's own command logs for a task, one request at a time."""
    import lm_eval  # these two take seconds
    from lm_eval.models.huggingface import HFLM

    name = task.config.task
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.loaded, tokenizer=model.tokenizer, batch_size=1),
        tasks=[task],
        num_fewshot=num_fewshot,
        task_manager=task_manager(local_tasks()[name].folder),
        samples={name: drawn},
    )
    assert results is not None
    return results["samples"][name]


def differing_items(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many items differ in their requests, in the chosen answer, and in a score, by the samples of two runs."""
    differing: dict[str, set[int]] = {count: set() for count in COUNTS}
    for left, right in zip(ours, theirs, strict=True):
        assert (left["doc_id"], left["filter"]) == (right["doc_id"], right["filter"])
        differs = {
            "requests": left["arguments"] != right["arguments"],
            "answers": answer(left) != answer(right),
            "scores": any(left[metric] != right[metric] for metric in {*left["metrics"], *right["metrics"]}),
        }
        for count, different in differs.items():
            if different:
                differing[count].add(left["doc_id"])
    return {count: len(items) for count, items in differing.items()}


def requests(task: Any, items: list[int], num_fewshot: int | None) -> list[Any]:
    """What the task asks the model for each item, and the answer that it expects.

    Args:
        items: their numbers.
    """
    set_shots(task, num_fewshot)
    task.build_all_requests(samples=items)
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        # Where the options stand in the contexts (WinoGrande), the text is the number of the right one.
        first = [task.doc_to_text(instance.doc), task.doc_to_target(instance.doc)]
        asked.setdefault(instance.doc_id, first).append(instance.args)
    return list(asked.values())


def answer(sample: Mapping[str, Any]) -> Any:
    """The option with the highest likelihood, or the text that was generated."""
    first = sample["resps"][0][0]
    return first if isinstance(first, str) else int(np.argmax([response[0][0] for response in sample["resps"]]))


if __name__ == "__main__":
    run_command(main)
