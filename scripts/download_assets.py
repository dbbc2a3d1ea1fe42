#!/usr/bin/env python
"""Fetch everything that a task needs for offline use: models, fine-tuning rows and benchmarks. Sizes are shown first.

python scripts/download_assets.py --task malay thai [--sizes] [--data-dir data]

What is already there is left alone, and a download that was interrupted is continued. Afterwards
`HF_HUB_OFFLINE=1 DATA_DIR=data bash scripts/run_train_final.sh` runs without a network.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from core.data import HUB_IDS, DataSpec, export_rows
from core.errors import UserError, first_line
from core.files import LOCK
from core.hub import HUB_TIMEOUT_S, hub_refusal
from core.locks import file_lock
from core.models.locate import CARD_FILES, HUB_FILES, model_folder, models_root
from core.progress import Progress
from core.runs.command_line import EXPERIMENTS, Parser, load_experiment
from core.runs.process import run_command, setup_logging
from core.runs.settings import Experiment
from evaluation.benchmarks.harness import members, task_manager
from evaluation.benchmarks.registry import STAND_INS, task_benchmarks

log = logging.getLogger("download")
# Benchmarks that are repositories of their own -> the variable of run_train_final.sh that names a clone, the folder
# that a new clone gets, and its address.
REPOSITORIES = {
    "malay_mmlu": ("MALAY_REPO", "MalayMMLU", "https://github.com/UMxYTL-AI-Labs/MalayMMLU"),
    "yue_mmlu": ("YUE_BENCHMARK_ROOT", "Yue-Benchmark", "https://github.com/jiangjyjy/Yue-Benchmark"),
}


@dataclass(frozen=True)
class Asset:
    """One thing to fetch.

    Attributes:
        kind: model, rows, or benchmark.
        name: what the log calls it.
        size: a function that gives the bytes that are still to be fetched, or None where they are not known before.
        fetch: a function that fetches it.
    """

    kind: str
    name: str
    size: Callable[[], int | None]
    fetch: Callable[[], None]


def main(argv: list[str]) -> None:
    setup_logging()
    parser = Parser(__doc__ or "")
    parser.add_argument("--task", nargs="+", required=True, help="experiments, e.g. malay thai; general: Figure 6")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="rows go to DATA_DIR/TASK.jsonl")
    parser.add_argument(
        "--workspace",
        type=Path,
        default=Path(os.environ.get("WORKSPACE_ROOT", ".")),
        help="repositories of benchmarks go here (default $WORKSPACE_ROOT, or here)",
    )
    parser.add_argument("--sizes", action="store_true", help="show what would be fetched, fetch nothing")
    given = parser.parse(argv)
    wanted: dict[tuple[str, str], Asset] = {}
    for task in given["task"]:
        for asset in assets(task, given["data_dir"], given["workspace"]):
            wanted.setdefault((asset.kind, asset.name), asset)  # several tasks may need the same one
    show_sizes(wanted.values())
    if not given["sizes"]:
        fetch(wanted.values())


def assets(task: str, data_dir: Path, workspace: Path) -> list[Asset]:
    """Everything that a task reads. Raises UserError for an unknown task."""
    found = []
    names = list(task_benchmarks(task))
    if task != "general":
        experiment = Experiment.of(**load_experiment(EXPERIMENTS / f"{task}.yaml"))
        models = experiment.models
        for name in filter(None, (models.target_model, models.source_model, models.source_base)):
            found.append(Asset("model", name, partial(_model_size, name), partial(_fetch_model, name)))
        spec, path = experiment.data.spec, data_dir / f"{task}.jsonl"
        if spec.subset in HUB_IDS:
            name = f"{HUB_IDS[spec.subset]} -> {path}"
            found.append(Asset("rows", name, partial(_size_of_missing, path), partial(_fetch_rows, spec, path)))
    for name in list(names):
        if name in REPOSITORIES:
            names.remove(name)
            names += STAND_INS.get(name, ())
            variable, folder, address = REPOSITORIES[name]
            clone = Path(os.environ.get(variable, workspace / folder))
            size, action = partial(_size_of_missing, clone), partial(_clone, address, clone)
            found.append(Asset("benchmark", f"{address} -> {clone}", size, action))
    return found + (_harness_assets(names) if names else [])


def show_sizes(wanted: Collection[Asset]) -> None:
    """Log the size of each asset, and of all that have one."""
    total = 0
    for asset in wanted:
        size = _result_or_reason(asset, asset.size)
        total += size if isinstance(size, int) else 0
        shown = size if isinstance(size, str) else "size not known before" if size is None else _gib(size)
        log.info("%-10s %-60s %s", asset.kind, asset.name, shown)
    log.info("%s to fetch, %s free here", _gib(total), _gib(shutil.disk_usage(".").free))


def fetch(wanted: Collection[Asset]) -> None:
    """Fetch all assets. Raises UserError at the end, with what could not be fetched and why."""
    failed = []
    for asset in Progress(wanted, desc="fetching", unit="assets"):
        reason = _result_or_reason(asset, asset.fetch)
        if isinstance(reason, str):
            failed.append(f"{asset.kind} {asset.name}: {reason}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(wanted)} could not be fetched; the same command tries them again:\n  "
            + "\n  ".join(failed)
        )


def _harness_assets(names: list[str]) -> list[Asset]:
    """The data sets of tasks of lm-evaluation-harness."""
    index = task_manager().task_index
    names = [part for name in names for part in members(name)]
    sets = {(index[name].cfg["dataset_path"], index[name].cfg.get("dataset_name")) for name in names}
    found = []
    for path, config in sorted(sets, key=str):
        name = f"{path} {config or ''}".strip()
        found.append(Asset("benchmark", name, partial(_data_size, path), partial(_fetch_data, path, config)))
    return found


def _result_or_reason(asset: Asset, action: Callable[[], Any]) -> Any:
    """What `action` returns, or one line that says why it failed."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return action()
    except (UserError, OSError, ValueError, HTTPError, DatasetsError, RuntimeError) as error:  # the last: of datasets
        return hub_refusal(asset.name, None, error) or first_line(error)


def _size_of_missing(path: Path) -> int | None:
    """0 for what is there; the size of rows or a clone is not known before it is fetched."""
    return 0 if path.exists() else None


def _model_size(name: str) -> int:
    """The bytes of a model that are still to be fetched."""
    from huggingface_hub import HfApi, snapshot_download

    if (models_root() / name).exists():
        return 0
    HfApi().model_info(name, timeout=HUB_TIMEOUT_S)  # fails fast where there is no hub
    files: list[Any] = snapshot_download(name, allow_patterns=[*HUB_FILES, *CARD_FILES], dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def _fetch_model(name: str) -> None:
    model_folder(name, None, trust_remote_code=False)  # this also converts models that have only .bin weights


def _data_size(name: str) -> int | None:
    """The bytes of a data set's repository, with all its configurations."""
    from huggingface_hub import HfApi

    files = HfApi().dataset_info(name, files_metadata=True, timeout=HUB_TIMEOUT_S).siblings or []
    return sum(file.size or 0 for file in files) or None


def _fetch_data(name: str, config: str | None) -> None:
    import datasets

    datasets.load_dataset(name, config)


def _fetch_rows(spec: DataSpec, path: Path) -> None:
    if not path.is_file():
        export_rows(spec, path)


def _clone(address: str, folder: Path) -> None:
    """Clone the last state of a repository. An interrupted clone leaves nothing under the name of the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".cloning-{folder.name}")
    with file_lock(folder.with_name(f"{LOCK}-{folder.name}"), str(folder), wait=True):
        if folder.is_dir():
            return
        shutil.rmtree(temporary, ignore_errors=True)
        command = ["git", "clone", "--quiet", "--depth", "1", address, str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
        if done.returncode:
            raise UserError(f"git clone {address}: {done.stderr.strip() or done.returncode}")
        temporary.rename(folder)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    run_command(main)
