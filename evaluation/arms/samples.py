"""`samples.json` of a run: the same prompts continued by base, fused, adapted and source; an illustration, no more."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import first_line
from core.files import digest_of, read_json, write_json
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.progress import Progress
from core.texts.rows import Row
from evaluation.arms.models import UNUSABLE, Arms
from evaluation.benchmarks.generation import Decoding, answers
from evaluation.benchmarks.prompts import CHAT, PLAIN
from evaluation.evaluated_model import EvaluatedModel, finite_answers

log = logging.getLogger(__name__)
SAMPLES = "samples.json"
# How many prompts are continued, by how many tokens, and how many characters of a plain text are its prompt.
PROMPTS, NEW_TOKENS, PROMPT_CHARACTERS = 3, 40, 160


def write_samples(path: Path, arms: Arms, rows: Sequence[Row]) -> None:
    """Continue prompts from held-out rows greedily with every model, and write the texts.

    Models whose texts are in the file already are not asked again. A model that cannot be asked, such as one without a
    chat template, is left out with a warning, because the table of arms does not depend on it. A greedy text of a few
    dozen tokens says next to nothing about a model; it only lets a reader see what kind of text this is about.

    Args:
        arms: the arms of the run.
        rows: the held-out rows.
    """
    policy, prompts = prompts_of(rows, arms.target.load_tokenizer().chat_template is not None)
    asked = {"policy": policy, "prompts": prompts, "max_new_tokens": NEW_TOKENS}
    before = read_json(path) if path.is_file() else {}
    same = all(before.get(key) == value for key, value in asked.items())
    told = before["texts"] if same else {}
    record: dict[str, Any] = {**asked, "texts": {}}
    for name, (checkpoint, made) in Progress(sampled_models(arms).items(), desc="text samples", unit="models"):
        if told.get(name, {}).get("made") != made:
            gc.collect()  # the model before this one may fill the memory
            try:
                texts = continuations(EvaluatedModel(checkpoint, arms.experiment.compute.dtype), prompts, policy)
            except UNUSABLE as error:
                log.warning("%s has no text samples: %s", name, first_line(error))
                continue
            told[name] = {"made": made, "continuations": texts}
        record["texts"][name] = told[name]
        write_json(path, record)


def continuations(model: EvaluatedModel, prompts: Sequence[str], policy: str) -> list[str]:
    """What a model says to every prompt. Raises UserError where it has no chat template, or logits are not finite."""
    with finite_answers(model, "text samples"):
        return answers(model, prompts, Decoding(max_new_tokens=NEW_TOKENS, prompt=policy))


def sampled_models(arms: Arms) -> dict[str, tuple[Checkpoint, str]]:
    """Name -> (the model, digest of what it is); of the trainings only the first seed of the fused model."""
    models, compute = arms.experiment.models, arms.experiment.compute
    found = {"base": (arms.target, digest_of(arms.target.identity["weights"]))}
    trained = next((arm for arm in arms.run.checkpoints if arm.startswith("fused_adapted/")), None)
    for name, arm in (("fused", "fused"), ("fused_adapted", trained)):
        if arm is not None:
            manifest = arms.run.checkpoints[arm]
            checkpoint = open_checkpoint(str(manifest.folder), None, models.trust_remote_code, compute.device)
            found[name] = (checkpoint, manifest.record["fingerprint"])
    return found | {"source": (arms.source, digest_of(arms.source.identity["weights"]))}


def prompts_of(rows: Sequence[Row], has_template: bool) -> tuple[str, list[str]]:
    """(how models are prompted, the prompts), from the first rows of different groups.

    Of a conversation the first message of the user is the prompt, which every model reads in its own chat template.
    Plain text is cut between two words, and the models go on from there.
    """
    first: dict[str, Row] = {}  # group -> its first row
    for row in rows:
        first.setdefault(row.group, row)
    chosen = [*first.values()][:PROMPTS]
    if has_template and all(row.has_roles for row in chosen):
        return CHAT, [next((text for role, text in row.messages if role == "user"), row.plain) for row in chosen]
    return PLAIN, [beginning(row.plain) for row in chosen]


def beginning(text: str) -> str:
    """The first half of a text, or `PROMPT_CHARACTERS` of it, without a word that is cut in two."""
    part = text[: min(PROMPT_CHARACTERS, (len(text) + 1) // 2)]
    return part.rsplit(maxsplit=1)[0] if len(part.split()) > 1 else part
