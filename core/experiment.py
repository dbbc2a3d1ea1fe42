"""One experiment = one YAML = one frozen dataclass. Every key is a flag of the commands that use it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from core.attention import SEED_MODEL_TYPES
from core.checkpoints import Checkpoint, open_checkpoint
from core.data import DATA_SUBSETS
from core.fusion import FEATURE_MAPS, RESIDUAL_FORMS, FusionSettings
from core.hot_residual import FREEZE_STRATEGIES
from core.hub import check_repo_id
from core.runs import UserError, write_text

MIN_TEXTS = 16
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "disk")


def option(default: Any, stages: str, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a flag of the commands in `stages` (1, 2, 3; e for evaluation)."""
    return field(default=default, metadata={"stages": stages, "help": help, "choices": choices})


@dataclass(frozen=True)
class Experiment:
    """All settings of one run. Keys of the YAML and flags of the commands are these fields."""

    name: str = option("experiment", "", "name of the run; outputs go to runs/<name>/")
    target_model: str = option("", "12e", "small model that is improved: folder, id in $MODELS_ROOT, or hub id")
    source_model: str = option("", "12e", "model that gives knowledge: folder, id in $MODELS_ROOT, or hub id")
    target_revision: str | None = option(None, "12e", "hub revision of the target")
    source_revision: str | None = option(None, "12e", "hub revision of the source")
    trust_remote_code: bool = option(False, "13e", "allow code that comes with a model")
    device: str = option("cpu", "123e", "torch device, e.g. cpu or cuda:0")
    dtype: str = option("auto", "13e", "compute dtype; auto: float32 on a CPU, else the model's own",
                        ("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    seed: int = option(0, "13e", "seed of the row sample, of training and of the bootstrap")
    split_seed: int = option(0, "13e", "seed of the split into calibration, fine-tuning and held-out texts")

    data_subset: str = option("", "13e", "texts", tuple(DATA_SUBSETS))
    data_file: str | None = option(None, "13e", "local .jsonl, .json, .csv, .parquet or .txt in place of the hub")
    calibration_samples: int = option(2000, "1", "at most so many texts are read by both models")
    max_tokens: int = option(512, "1e", "calibration and held-out texts are cut at so many tokens")
    pooling: str = option("text", "1", "text: one mean per text (the paper); token: one row per aligned position",
                          ("text", "token"))  # fmt: skip
    max_rows: int = option(4096, "1", "at most so many rows with token pooling")
    tokens_per_batch: int = option(4096, "1e", "tokens per forward pass, padding included; a longer text goes alone")
    activations_budget_mb: int = option(16384, "1", "memory for one model's rows in each process; beyond it they are "
                                        "kept in a temporary file of the plan directory")  # fmt: skip
    device_map: str | None = option(None, "1", "spread each model over devices and disk while it reads; default all "
                                    "of it on --device", DEVICE_MAPS)  # fmt: skip

    epsilon: float | None = option(None, "1", "entropic regularisation of Q; default 0.1, and 0.03 for gsm8k")
    eta: float = option(0.1, "1", "entropic regularisation of P")
    sinkhorn_iters: int = option(1000, "1", "upper bound on Sinkhorn iterations")
    sinkhorn_tol: float = option(1e-6, "1", "bound on the larger L1 marginal error of Q")
    sinkhorn_mode: str = option("auto", "1", "auto, or paper: exactly --sinkhorn-iters plain iterations (it used 200)",
                                ("auto", "paper"))  # fmt: skip
    pairs_budget_mb: int = option(8192, "1", "memory for the source's rows of one side; beyond it they are read "
                                  "again for every target layer")  # fmt: skip
    layer_cost_scale: str = option("median", "1", "scale of the layer cost: median, or none (the paper's letter)",
                                   ("median", "none"))  # fmt: skip

    feature_map: str = option("coupling", "2", "how plans become linear maps (README: four feature maps)",
                              FEATURE_MAPS)  # fmt: skip
    residual_form: str = option("interpolate", "2", "(1-a) W + a W~, or W + a W~ (additive)", RESIDUAL_FORMS)
    alpha: float = option(0.1, "2", "fusion strength, 0 to 1")
    top_k: int = option(128, "2", "strongest neurons fused per layer and projection; 0: all")
    p_topk: int | None = option(None, "2", "source layers per target layer; default 1 for regression, else all with at "
                                "least 1e-4 of the row of P")  # fmt: skip
    q_topk: int | None = option(None, "2", "entries kept per row of Q (not for regression); default all")
    ridge: float = option(0.01, "2", "lambda of the regression maps, relative to the mean diagonal")

    push_to_hub: str | None = option(None, "23", "upload the finished checkpoint to this hub repository (made private "
                                     "when new); stage 3 appends -adapted, or -no-hot for no_hot")  # fmt: skip
    max_shard_size: str = option("5GB", "23", "largest file of weights, e.g. 5GB or 500MB; one is in memory at a time")

    model_type: str | None = option(None, "3", "family of --model_dir; detected when left out",
                                    tuple(SEED_MODEL_TYPES))  # fmt: skip
    training_scenario: str = option("hot", "3", "hot: train from the fused start with its residual; "
                                    "no_hot: the same from the unfused target", ("hot", "no_hot"))  # fmt: skip
    freeze_strategy: str = option("frozen_hot", "3", "with hot: frozen_hot (= frozen_transport) fixes the residual; "
                                  "frozen_base: only it trains; none: both train", FREEZE_STRATEGIES)  # fmt: skip
    train_alpha: float | None = option(None, "3", "with hot: residual strength while training; default the fused one")
    sft_samples: int = option(2000, "3", "at most so many fine-tuning rows")
    block_size: int = option(2048, "3", "fine-tuning rows are cut at so many tokens")
    epochs: float = option(1.0, "3", "passes over the fine-tuning rows")
    train_batch_size: int = option(1, "3", "rows per device and step")
    gradient_accumulation: int = option(8, "3", "steps per optimizer update")
    learning_rate: float = option(1e-6, "3", "peak learning rate")
    save_steps: int = option(200, "3", "optimizer updates between training checkpoints (resume points)")

    held_out_samples: int = option(64, "e", "at most so many held-out texts")
    general_file: str | None = option(
        None, "e", "local general text; what fusion costs there is reported beside the gain"
    )
    bootstrap_samples: int = option(10000, "e", "resamples of the paired bootstrap")

    @property
    def run_dir(self) -> Path:
        """Folder of this experiment's outputs."""
        return Path("runs") / self.name

    @property
    def regularisation(self) -> float:
        """epsilon, or the paper's for the data."""
        return self.epsilon if self.epsilon is not None else (0.03 if self.data_subset == "gsm8k" else 0.1)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number. Raises UserError when it is none."""
        from accelerate.utils import convert_file_size_to_int

        try:
            return convert_file_size_to_int(self.max_shard_size.upper().replace("IB", "iB"))
        except ValueError:
            raise UserError(f"max_shard_size is {self.max_shard_size!r}; expected a size like 5GB or 500MB") from None

    def fusion_settings(self) -> FusionSettings:
        """The part that stage 2 needs."""
        return FusionSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(FusionSettings)})

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("alpha", "train_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; expected a number from 0 to 1")
        for name in ("epsilon", "eta", "sinkhorn_tol", "ridge", "epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value}; expected a positive number")
        if self.max_rows < MIN_TEXTS:
            raise UserError(f"max_rows is {self.max_rows}; plans need at least {MIN_TEXTS} rows")
        if self.seed < 0 or self.split_seed < 0:
            raise UserError(f"seed is {min(self.seed, self.split_seed)}; expected 0 or more")
        if self.q_topk is not None and self.feature_map == "regression":
            raise UserError("q_topk thins out plans, which regression does not read; leave it out")
        for name in ("max_tokens", "tokens_per_batch", "sinkhorn_iters", "pairs_budget_mb", "p_topk", "q_topk",
                     "sft_samples", "block_size", "train_batch_size", "gradient_accumulation", "save_steps",
                     "held_out_samples", "bootstrap_samples"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if (self.freeze_strategy, self.train_alpha) == ("frozen_base", 0):
            raise UserError("alpha 0 leaves nothing to train with frozen_base; give a larger one")
        check_repo_id(self.push_to_hub)
        if self.max_shard_bytes < 1:
            raise UserError(f"max_shard_size is {self.max_shard_size!r}; expected a size like 5GB or 500MB")
        if self.activations_budget_mb < 0:
            raise UserError(f"activations_budget_mb is {self.activations_budget_mb}; expected 0 (all on disk) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (all neurons) or more")
        if self.calibration_samples < MIN_TEXTS:
            raise UserError(f"calibration_samples is {self.calibration_samples}; plans need at least {MIN_TEXTS} texts")
        try:
            device = torch.device(self.device)
            present = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
            usable = (device.index or 0) < present
        except RuntimeError:
            usable = False
        if not usable:
            raise UserError(f"device {self.device!r} is not available here; use cpu, or cuda on a machine with a GPU")
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in (None, "") and value not in choices:
                raise UserError(f"{f.name} is {value!r}; expected one of {', '.join(choices)}")


def open_pair(experiment: Experiment) -> tuple[Checkpoint, Checkpoint]:
    """The experiment's (target, source), opened on its device. Raises UserError as `open_checkpoint`."""
    code, device = experiment.trust_remote_code, experiment.device
    return (open_checkpoint(experiment.target_model, experiment.target_revision, code, device),
            open_checkpoint(experiment.source_model, experiment.source_revision, code, device))  # fmt: skip


def load_experiment(path: Path, quick: bool = False) -> dict[str, Any]:
    """Read the keys of an experiment YAML; `quick` applies its `quick:` section (same run on less data).

    Raises UserError for a missing file, an unknown key (with the known ones) or a value of the wrong type.
    """
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"experiment file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"experiment file {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    less = keys.pop("quick", None) or {}
    if not isinstance(less, dict):
        raise UserError(f"{path}: `quick:` must hold `key: value` lines of its own")
    if quick:
        if not less:
            raise UserError(f"{path} has no `quick:` section")
        keys = {**keys, **less, "name": f"{keys.get('name', path.stem)}-quick"}
    keys.setdefault("name", path.stem)
    fields = {f.name: f for f in dataclasses.fields(Experiment)}
    for key in (*keys, *less):
        if key not in fields:
            raise UserError(f"{path}: unknown key {key!r}; known keys: {', '.join(fields)}")
    return {key: _typed(fields[key], value, path) for key, value in keys.items()}


def _typed(f: dataclasses.Field, value: Any, path: Path) -> Any:
    """YAML reads 2e-5 as a string and 1 as an int; turn both into what the field is."""
    kind = _kind(f)
    if value is None and "None" in str(f.type):
        return None
    if kind is not bool and not isinstance(value, bool):
        try:
            if kind is not int or float(value) == int(value):
                return kind(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind is bool and isinstance(value, bool):
        return value
    raise UserError(f"{path}: {f.name} is {value!r}; expected {kind.__name__}")


def _kind(f: dataclasses.Field) -> type:
    return {"str": str, "int": int, "float": float, "bool": bool}[str(f.type).split(" |")[0]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Command:
    """A parsed command line: the experiment, the folders given as flags (None where not given), and the modes."""

    experiment: Experiment
    paths: dict[str, Path | None]
    from_config: bool
    modes: frozenset[str] = frozenset()

    @property
    def log_file(self) -> Path | None:
        """Log of the run; commands without --config log to the screen only."""
        return self.experiment.run_dir / "log.txt" if self.from_config else None

    def path(self, name: str, default: str) -> Path:
        """A folder given by flag, else its place in the run directory."""
        given = self.paths[name]
        if given is not None:
            return given
        if not self.from_config:
            raise UserError(f"--{name} is missing (or give --config FILE.yaml)")
        return self.experiment.run_dir / default


def parse_command(
    argv: Sequence[str],
    stage: str,
    description: str,
    paths: dict[str, str],
    aliases: dict[str, str] | None = None,
    modes: dict[str, str] | None = None,
) -> Command:
    """Parse a stage's command line: its experiment keys as flags, `--config`, `--quick` and its folders.

    Dashes and underscores are interchangeable in every flag; flags override the YAML.

    Args:
        stage: `1`, `2`, `3` or `e`.
        paths: folder flag -> help.
        aliases: extra flag -> experiment key (the seed README's spellings).
        modes: flag -> help, of switches that make the command do something else with the same settings.
    Raises:
        UserError: unknown flag or key, wrong type, value out of range.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="experiment file; flags override it")
    parser.add_argument("--quick", action="store_true", help="apply the experiment's `quick:` section")
    for name, text in paths.items():
        parser.add_argument(_flag(name), dest=name, type=Path, help=text)
    for name, text in (modes or {}).items():
        parser.add_argument(_flag(name), dest=name, action="store_true", help=text)
    for f in dataclasses.fields(Experiment):
        if stage not in f.metadata["stages"]:
            continue
        flags = [_flag(f.name), *(_flag(alias) for alias, key in (aliases or {}).items() if key == f.name)]
        kind: dict[str, Any] = {"action": "store_true"} if _kind(f) is bool else {
            "type": _kind(f), "choices": f.metadata["choices"], "metavar": _kind(f).__name__.upper()}  # fmt: skip
        text = f"{f.metadata['help']}" + (f" {{{','.join(f.metadata['choices'])}}}" if f.metadata["choices"] else "")
        default = "" if f.default in (None, "") or "default" in text else f" (default {f.default})"
        parser.add_argument(*flags, dest=f.name, default=None, help=(text + default).replace("%", "%%"), **kind)
    given = vars(parser.parse_args([_flag_of(token) for token in argv]))
    config, quick = given.pop("config"), given.pop("quick")
    folders = {name: given.pop(name) for name in paths}
    chosen = {name for name in modes or {} if given.pop(name)}
    if quick and config is None:
        raise UserError("--quick needs --config")
    keys = load_experiment(config, quick) if config else {}
    keys |= {key: value for key, value in given.items() if value is not None and value is not False}
    experiment = Experiment(**keys)
    experiment.check()
    return Command(experiment, folders, config is not None, frozenset(chosen))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag_of(token: str) -> str:
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value


def save_resolved(experiment: Experiment, stage: str, folder: Path) -> None:
    """Write the settings a stage really used beside its output."""
    used = {
        f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment) if stage in f.metadata["stages"]
    }
    write_text(folder / "resolved.yaml", yaml.safe_dump({"name": experiment.name, **used}, sort_keys=False))
