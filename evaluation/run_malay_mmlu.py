#!/usr/bin/env python
"""MalayMMLU of a checkpoint, asked as its own evaluation asks: accuracy by first token and by full answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.files import read_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.malay_scores import METRICS, score_malay_mmlu
from evaluation.benchmarks.prompts import PromptSettings, prompt_flags
from evaluation.runner import Scoring, runner_flags


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = runner_flags(__doc__ or "")
    parser.add_argument("--data-dir", type=Path, help="folder of MalayMMLU_<N>shot.json (default $MALAY_REPO/data)")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in the prompt, 0 to 3 (default 0)")
    prompt_flags(parser, llama_name=True)
    given = parser.parse(argv)
    scoring = Scoring.from_flags(given)
    hold(scoring.output_dir)
    prompts = PromptSettings(given["prompt"], given["llama_name"])
    print(table(read_json(score_malay_mmlu(scoring, given["data_dir"], given["shots"], prompts))))


def table(record: Mapping[str, Any]) -> str:
    """The accuracies of a score file by category, over all questions, and as the mean of the categories."""
    n_all = record["metrics"][METRICS[0]]["n"]
    rows = [
        (category, found[METRICS[0]]["n"], [found[metric]["value"] for metric in METRICS])
        for category, found in record["groups"].items()
    ]
    means = [sum(values[number] for _, _, values in rows) / len(rows) for number in range(len(METRICS))]
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
