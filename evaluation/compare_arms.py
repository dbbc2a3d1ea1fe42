#!/usr/bin/env python
"""Compare base, controls, fused and adapted models on held-out texts: one table that says whether fusion helped."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.errors import UserError, first_line
from core.locks import hold, outputs_held
from core.models.checkpoints import open_pair
from core.runs.card import add_results, results_section
from core.runs.command_line import Command, parse_command, save_resolved, unfinished
from core.runs.plan_directory import PlanDirectory
from core.runs.process import end_of_stage, log_to_file, run_command, setup_logging, show
from core.runs.settings import Experiment
from evaluation.arms.bits import SOURCE
from evaluation.arms.models import UNUSABLE, Arms, open_base_of
from evaluation.arms.results import Results
from evaluation.arms.run import RESULTS, Run, folders_to_compare
from evaluation.arms.samples import SAMPLES, write_samples
from evaluation.arms.texts import TextSet, text_sets
from evaluation.arms.verdict import strength_notes, table, trial_notes

log = logging.getLogger("compare")
MODES = {"dry_run": "check everything that can be checked without loading a model, print it, and stop"}
FOLDERS = {"run_dir": "run directory (default runs/<name>)", "hot_dir": "plan directory (default plans, in it)"}


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    command = parse_command(argv, "e", __doc__ or "", FOLDERS, modes=MODES)
    experiment, folder = command.experiment, command.path("run_dir", ".")
    plan_folder = plan_folder_of(command)
    if "dry_run" in command.modes and (waiting := what_is_unfinished(folder, plan_folder)):
        print(waiting)
        return
    plans = PlanDirectory(plan_folder, experiment.compute.device)
    run = Run.open(folder, plans)
    target, source = open_pair(experiment.models, experiment.compute.device)
    plans.check_models(target, source)
    arms = Arms(run, target, source, experiment, open_base_of(run, experiment, source))
    sets = text_sets(experiment, run, (target.load_tokenizer(), source.load_tokenizer()))
    if "dry_run" in command.modes:
        print(report(arms, sets))
        return
    hold(folder)
    log_to_file(command.log_file("run_dir", "."))
    results = Results(folder / RESULTS, inputs_of(run, sets, experiment), arms.made_from, sets)
    record = measured(arms, results, sets)
    save_resolved(experiment, "e", folder)
    text = table(record["arms"], record["held_out"], record.get("arms_general"), record.get("general"))
    text = "\n".join([text, *strength_notes(record["strengths"]), *trial_notes(run.trials)])
    show(text)
    write_to_cards(run, sets["held_out"].identity, text)
    write_samples(folder / SAMPLES, arms, sets["held_out"].rows)
    end_of_stage(f"{folder / RESULTS} is finished", shlex.join(["python", "evaluation/report.py", str(folder)]))


def measured(arms: Arms, results: Results, sets: Mapping[str, TextSet]) -> dict[str, Any]:
    """Measure what is missing and return the contents of `results.json`.

    The file is finished once before the source is loaded, which may be too large for this machine: the comparison of
    arms does not need it. Where the source cannot be measured, the results lack its bits per byte and the share of the
    gap that each arm closes.
    """
    for arm, losses in arms.losses([arm for arm in results.missing if arm != SOURCE], sets):
        results.add(arm, losses)
    strength = arms.run.fused.record.get("strength")
    record = results.finish(arms.absent, strength)
    if SOURCE not in results.missing:
        return record
    try:
        for arm, losses in arms.losses([SOURCE], sets):
            results.add(arm, losses)
    except UNUSABLE as error:
        log.warning("the source is left out of bits per byte: %s", first_line(error))
    return results.finish(arms.absent, strength)


def plan_folder_of(command: Command) -> Path:
    """The plan directory: the one that is given, or else the one in the run directory that is given, or else the one
    that the experiment says."""
    if command.paths["hot_dir"] is None and command.paths["run_dir"] is not None:
        return command.paths["run_dir"] / "plans"
    return command.path("hot_dir", "plans")


def what_is_unfinished(run: Path, plans: Path) -> str | None:
    """What a dry run says while an earlier stage has not finished its folder; None when all of them have."""
    trainings = [folder for folders in folders_to_compare(run).values() for folder in folders]
    stages = {plans: "plans", run / "fused": "fused", **dict.fromkeys(trainings, "adapted")}
    return next(filter(None, (unfinished(folder, stage) for folder, stage in stages.items())), None)


def report(arms: Arms, sets: Mapping[str, TextSet]) -> str:
    """What would be compared."""
    lines = [f"{name}: {len(texts.examples)} texts, {sum(texts.tokens)} tokens" for name, texts in sets.items()]
    return "\n".join([*lines, f"arms: {', '.join(arms.made_from)}; nothing is missing"])


def inputs_of(run: Run, sets: Mapping[str, TextSet], experiment: Experiment) -> dict[str, Any]:
    """Everything that the losses of all arms depend on; each arm has what else it depends on in `Arms.made_from`."""
    return {
        "fused": run.fused.record["fingerprint"],
        "data": sets["held_out"].identity,
        "general": sets["general"].identity if "general" in sets else None,
        "settings": experiment.deciding("e"),
    }


def write_to_cards(run: Run, data: Mapping[str, Any], text: str) -> None:
    """Put the table into the model card of every checkpoint that was compared.

    A checkpoint that another command is writing keeps its card, and the log says so: the results themselves are
    already in `results.json`.
    """
    for arm, manifest in run.checkpoints.items():
        try:
            add_results(manifest.folder, results_section(arm, data, text))
        except UserError as error:
            log.warning("the results are not in the card of %s: %s", manifest.folder, error)


if __name__ == "__main__":
    run_command(main)
