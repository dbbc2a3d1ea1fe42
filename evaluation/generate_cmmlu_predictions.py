"""Let a chat model answer Yue-MMLU, in the benchmark's own format, and score the answers by its rules.

    python evaluation/generate_cmmlu_predictions.py --model MODEL --output_dir DIR [--predictions_dir DIR] [--shots 5]

Questions come from $YUE_BENCHMARK_ROOT or --data_dir. The command writes PREDICTIONS/NAME/cmmlu-yue-SUBJECT-Nshot.json,
which evaluate_cmmlu_yue.py reads, and OUTPUT/yue_mmlu.json with the score of every item. A subject that is finished for
the same model, questions and settings is not asked again; `manifest.json` beside the predictions says what each file
was made from.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.files import read_json
from core.locks import hold, outputs_held
from core.runs.process import run_command, setup_logging
from evaluation.benchmarks.generation import Decoding
from evaluation.benchmarks.prompts import prompt_flags
from evaluation.benchmarks.yue_mmlu import MAX_SHOTS, ROOT_VARIABLE, question_folder
from evaluation.benchmarks.yue_predictions import score_yue_mmlu
from evaluation.runner import Scoring, runner_flags


@outputs_held()
def main(argv: list[str]) -> None:
    setup_logging()
    parser = runner_flags((__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help=f"the SUBJECT.json (default: those in ${ROOT_VARIABLE})")
    parser.add_argument("--predictions-dir", type=Path, help="default: predictions, in the output folder")
    parser.add_argument("--name", help="folder of the predictions (default: the model as given, / as --)")
    parser.add_argument(
        "--shots", type=int, default=0, choices=range(MAX_SHOTS + 1), help="solved examples in the prompt (default 0)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default 32)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0 (default 0)")
    prompt_flags(parser, llama_name=False)
    given = parser.parse(argv)
    settings = ("max_new_tokens", "temperature", "seed", "tokens_per_batch", "prompt")
    decoding = Decoding(**{name: given[name] for name in settings})
    data_dir = question_folder(given["data_dir"])
    scoring = Scoring.from_flags(given)
    hold(scoring.output_dir)
    path = score_yue_mmlu(scoring, data_dir, given["shots"], decoding, given["predictions_dir"], given["name"])
    record = read_json(path)
    print(f"yue_mmlu, {record['details']['prompt_policy']}")
    for name, found in {**record["groups"], "overall": record["metrics"]}.items():
        print(f"{name:16}{100 * found['acc']['value']:7.2f} % of {found['acc']['n']}")


if __name__ == "__main__":
    run_command(main)
