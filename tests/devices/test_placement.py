"""All four stages on an imaginary GPU: the CPU's results, nothing mixed, and a placement that is removed is caught."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_main
from device_rules import PlacementError
from imaginary_device import imaginary_device
from malay_rows import rows, write
from removed_placements import Placement, placements, removed, watched
from safetensors.torch import load_file, save_file
from stages import fuse, train
from torch.testing import assert_close

import run_activs_and_hot as stage1
from core.errors import UserError
from core.hot_transport import compute_Q_and_layer_costs
from core.training.start import open_start
from evaluation import compare_arms, run_task

# How many placements are removed from each stage, chosen by SEED; None: all that move something in it.
REMOVED, SEED = 1, 14
# Pooling of stage 1 -> (target, source). The second target has biases, the first one's source.
PAIRS = {"token": ("target", "source"), "text": ("source", "target")}
# Fusions of stage 2 -> the plans, and flags.
FUSIONS = {
    "coupling": ("token", "--feature-map", "coupling", "--top-k", 0),
    "barycentric": ("text", "--feature-map", "barycentric", "--top-k", 5),
    "calibrated": ("token", "--feature-map", "calibrated", "--top-k", 5, "--residual-form", "additive", "--q-topk", 2),
    "regression": ("token", "--feature-map", "regression", "--top-k", 5),
    "biased": ("text", "--feature-map", "regression", "--top-k", 5),
}
RIVALS = ("no_hot", "distill")
# Trainings of stage 3 -> their start, and flags.
TRAININGS = {
    "hot": ("regression",),
    **{name: ("regression", "--training-scenario", name) for name in RIVALS},
    "packed": ("coupling", "--freeze-strategy", "none", "--packing", "--gradient-checkpointing"),
    "lora": ("biased", "--use-lora", "--save-untrained-folded"),
}
# Placements that may go without harm -> why: what a device refuses does not depend on them.
HARMLESS = {
    "core/models/activations.py mask.to(device)": "transformers moves a mask to its model",
    "core/batching.py mask.to(device)": "transformers moves a mask to its model",
    "evaluation/benchmarks/option_scores.py torch.tensor(owners": "indices of a tensor of the device may be on the CPU",
    "core/training/trainer.py value.to('cpu')": "what writes the file moves it as well",
    "core/transport/batch.py torch.ones(count, 1": "replaced before it is used",
    "core/transport/log_domain.py torch.zeros(n, ": "replaced before it is used",
    "core/train_hot_residual_sft.py value.to('cpu')": "what writes the file moves it as well",
    "core/files.py t.detach().cpu()": "safetensors moves what it writes",
}
# Where matrix products belong on the CPU: the fit of the reconstruction, from the parts on disk.
CPU_PRODUCTS = {("cpu", "core/hot_transport.py, reconstruction_fit")}


def run_stage1(case: Any, out: Path, device: str) -> None:
    for pooling, pair in PAIRS.items():
        flags = ("--pooling", pooling, "--max-tokens", 24, "--out-dir", out / pooling, "--device", device)
        run_main(stage1, *case.of_pair(pair), *flags)
    # An epsilon beyond a float's range, and a plan from rows that are on the device.
    x, y = (torch.randn(20, n, generator=torch.Generator().manual_seed(n)).to(device) for n in (6, 9))
    ((result,),), costs = compute_Q_and_layer_costs([x], [y], 0.001, n_iters=40)
    rows = result.plan_at(torch.tensor([0, 3], device=device))
    save_file({"costs": costs, "rows": rows.cpu()}, out / "log_domain.safetensors")


def run_stage2(case: Any, out: Path, device: str) -> None:
    for name, (plans, *flags) in FUSIONS.items():
        target, source = PAIRS[plans]
        shared = ("--alpha", "0.3", "--device", device)
        fuse(case.made[1] / plans, case.models, out / name, *shared, *flags, target=target, source=source)


def run_stage3(case: Any, out: Path, device: str) -> None:
    shared = ("--sft-samples", 4, "--validation-samples", 2, "--device", device)
    for name, (start, *flags) in TRAININGS.items():
        train(case.made[2] / start, out / name, *shared, *flags)
    teacher = ("--training-scenario", "distill", "--source-model", case.models["other"], "--data-file", case.texts)
    train(case.models["target"], out / "by_token", *shared, *teacher)
    # The Trainer moves a model as a whole; others who attach residuals do not.
    start = open_start(str(case.made[2] / "biased"), device=device)
    logits = start.load(0.3)(torch.arange(40, device=device).reshape(2, 20)).logits
    save_file({"logits": logits.detach()}, out / "logits.safetensors")


def run_stage4(case: Any, out: Path, device: str) -> None:
    """The arms of a run with its trainings and of two without; a generated benchmark and two by likelihood."""
    for name in ("regression", "calibrated", "biased"):
        plans, run = FUSIONS[name][0], out / name
        shutil.copytree(case.made[2] / name, run / "fused")
        for arm in ("hot", *RIVALS) if name == "regression" else ():
            shutil.copytree(case.made[3] / arm, run / "adapted" / arm / "seed0")
        flags = ("--held-out-samples", 6, "--device", device)
        folders = ("--run-dir", run, "--hot-dir", case.made[1] / plans)
        run_main(compare_arms, *folders, *case.of_pair(PAIRS[plans]), *flags)
    for task in ("malay", "cantonese", "medical"):
        model = ("--model", case.models["source"], "--data-dir", case.benchmarks, "--device", device)
        run_main(run_task, "--task", task, "--limit", 2, "--output-dir", out / task, *model)


RUNS: dict[int, Callable[[Any, Path, str], None]] = dict(enumerate((run_stage1, run_stage2, run_stage3, run_stage4), 1))


def forget_devices() -> None:
    """Accelerate and transformers keep for good which devices they found."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.utils import import_utils

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name, found in vars(import_utils).items():
        if "torch" in name and hasattr(found, "cache_clear"):
            found.cache_clear()


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Inside, libraries look for devices anew, and so they do afterwards."""
    forget_devices()
    try:
        yield
    finally:
        forget_devices()


@pytest.fixture(scope="module")
def case(models, texts, benchmark_data, tmp_path_factory):
    """What the stages read, and in `made` what each wrote on the CPU."""
    folder = tmp_path_factory.mktemp("placement")
    shutil.copytree(benchmark_data, folder / "benchmarks")
    (folder / "benchmarks/malay_mmlu").mkdir()
    write(folder / "benchmarks/malay_mmlu", *rows(8))
    case = SimpleNamespace(models=models, texts=texts, benchmarks=folder / "benchmarks", folder=folder, seen={})
    case.made = {stage: folder / f"cpu{stage}" for stage in RUNS}
    data = ("--data-subset", "file", "--data-file", texts)
    case.of_pair = lambda pair: ("--target-model", models[pair[0]], "--source-model", models[pair[1]], *data)
    with nothing_remembered():
        for stage, run in RUNS.items():
            run(case, case.made[stage], "cpu")
    return case


def on_device(case: Any, stage: int, name: str, change: Any = nullcontext) -> tuple[Counter, Any]:
    """Run a stage on the imaginary device, inside of `change`: (its matrix products by place, what `change` yields)."""
    with nothing_remembered(), imaginary_device() as operations, change() as yielded:
        RUNS[stage](case, case.folder / name, "cuda")
    return operations.products, yielded


def seen(case: Any, stage: int) -> tuple[Counter, set[Placement]]:
    """The stage as it is: (matrix products by place, placements that move something)."""
    if stage not in case.seen:
        case.seen[stage] = on_device(case, stage, f"cuda{stage}", watched)
    return case.seen[stage]


@pytest.mark.parametrize("stage", RUNS)
def test_a_stage_on_the_device_gives_what_the_cpu_gives(case, stage):
    """Real results: only the rounding of the batched solver, which stops at every tenth sweep, may differ."""
    products, _ = seen(case, stage)
    where = case.folder / f"cuda{stage}"
    assert {key for key in products if key[0] == "cpu"} <= CPU_PRODUCTS
    assert sum(count for (place, _), count in products.items() if place == "cuda") > 100
    for path in sorted(where.rglob("*.safetensors")):
        expected = load_file(case.made[stage] / path.relative_to(where))
        for key, value in load_file(path).items():
            if key not in ("n_iters", "error"):
                assert_close(value, expected[key], atol=1e-4, rtol=1e-4, msg=lambda m, at=(path, key): f"{at}: {m}")
    for path in sorted(where.rglob("results.json")):
        expected = json.loads((case.made[stage] / path.relative_to(where)).read_text())
        for arm, sets in json.loads(path.read_text())["per_text"].items():
            assert sets["held_out"] == pytest.approx(expected["per_text"][arm]["held_out"], abs=1e-3), arm
    for path in sorted(where.rglob("*_mmlu.json")):
        expected = json.loads((case.made[stage] / path.relative_to(where)).read_text())
        assert json.loads(path.read_text())["items"] == expected["items"]


def test_every_harmless_placement_is_one_of_the_product():
    """A key that no placement has exempts nothing, and hides that the code it was written for has moved."""
    there = [f"{place.file} {place.code}" for place in placements()]
    assert [key for key in HARMLESS if not any(code.startswith(key) for code in there)] == []


def chosen(places: set[Placement]) -> list[Placement]:
    """REMOVED of the placements that matter, in an order that other placements do not change."""
    places = {place for place in places if not f"{place.file} {place.code}".startswith(tuple(HARMLESS))}
    order = sorted(places, key=lambda p: hashlib.sha256(f"{SEED} {p.file} {p.function} {p.code}".encode()).digest())
    return order[:REMOVED]


@pytest.mark.parametrize("stage", RUNS)
def test_a_removed_placement_is_caught(case, stage, capsys):
    """It stops the stage with the line, or its matrix products move to the CPU."""
    products, moving = seen(case, stage)
    told = {}
    for number, place in enumerate(chosen(moving)):
        try:
            found, _ = on_device(case, stage, f"{stage}without{number}", lambda place=place: removed(place))
            told[place] = "products on the CPU" if found != products else None
        except (PlacementError, TypeError, UserError) as error:
            told[place] = str(error)
            assert "device" in told[place], told[place]
    escaped = [str(place) for place, how in told.items() if how is None]
    with capsys.disabled():
        count = f"{len(told) - len(escaped)} of {len(told)} removed placements are caught"
        print(f"\nstage {stage}: {count} ({len(moving)} move something)")
    assert not escaped


def test_a_device_that_is_not_there_is_refused_by_benchmarks(fails, models, tmp_path):
    flags = ("--model", models["target"], "--task", "malay", "--output-dir", tmp_path / "out", "--device", "cuda")
    assert "device 'cuda' is not available here; use cpu" in fails(run_task, *flags)
