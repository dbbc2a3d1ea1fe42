#!/usr/bin/env python
"""Peak memory of stage 2 for a 7B-shaped source and a 1B-shaped target, and what selected rows cost against dense ones.

    python scripts/bench/fusion.py [--layers 7 14 28] [--folder runs/bench_fusion] [--rows 256]

Both models are made here in bfloat16, with the right shapes and random projections; the source has nothing else. The
potentials and layer plans are made up as well, because neither memory nor time depends on their values. It takes 4 GB
of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from core.files import write_json, write_safetensors
from core.fusion.projections import ATTENTION, PROJECTIONS, planned_sides
from core.fusion.residual import select
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport
from core.manifest import Manifest
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.models.locate import INDEX_FILE
from core.runs import plan_files
from core.runs.plan_directory import PlanDirectory
from core.runs.rows_read import write_rows_read

ROOT = Path(__file__).resolve().parents[2]
TARGET = json.loads((ROOT / "scripts" / "configs" / "llama-3.2-1b.json").read_text())
SOURCE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
SHARD_LAYERS = 7
TOP_K = 128
EPSILON = 0.1
# Stage 2, followed by the peak memory of its process in KiB.
RUN = """
import sys
from core.generate_hot_residual import main
main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 14, 28], help="numbers of source layers")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_fusion"))
    parser.add_argument("--rows", type=int, default=256, help="calibration rows")
    parser.add_argument("--max-shard-size", default="1GB")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; k = {TOP_K}, {arguments.rows} rows, shards "
        f"of {arguments.max_shard_size}"
    )
    target = make_model(arguments.folder / "target", TARGET, whole=True)
    for n_layers in arguments.layers:
        source = make_model(arguments.folder / f"source-{n_layers}", {**SOURCE, "num_hidden_layers": n_layers})
        plans = make_plans(arguments.folder / f"plans-{n_layers}", target, source, arguments.rows)
        peak, seconds = fuse(plans, arguments.folder / "fused", arguments.max_shard_size)
        print(f"{n_layers} source layers: peak {peak / 2**30:.2f} GiB, {seconds:.0f} s")
    for what, top_k in (("selected", TOP_K), ("dense", 0)):
        print(f"one pair of layers, all projections, {what}: {pair_seconds(plans, source, top_k):.2f} s")
    shutil.rmtree(arguments.folder)


def fuse(plans: Path, out: Path, max_shard_size: str) -> tuple[int, float]:
    """(peak memory in bytes, seconds) of stage 2 in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--hot-dir", plans, "--output-dir", out, "--top-k", TOP_K, "--max-shard-size", max_shard_size]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, flags)], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE
    )
    return int(done.stdout.split()[-1]) * 1024, time.perf_counter() - start


def make_model(folder: Path, config: dict[str, Any], whole: bool = False) -> Checkpoint:
    """A bfloat16 checkpoint in shards of SHARD_LAYERS layers, whose projections are random.

    Args:
        whole: write all other weights as well, as zeros.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    with torch.device("meta"):  # names and shapes, without memory for the values
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    fused = tuple(f"{projection.path}.{kind}" for projection in PROJECTIONS.values() for kind in ("weight", "bias"))
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        if whole or name.endswith(fused):
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            shards.setdefault(f"model-{layer // SHARD_LAYERS:05}.safetensors", {})[name] = parameter.shape
    for file, shapes in tqdm(shards.items(), desc=f"making {folder.name}"):
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for name, tensor in tensors.items():
            if name.endswith(fused) and tensor.ndim == 2:
                tensor.normal_(0, 0.02)
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return open_checkpoint(str(folder))


def make_plans(folder: Path, target: Checkpoint, source: Checkpoint, rows: int) -> Path:
    """A plan directory with random activations, uniform potentials and layer plans that use every source layer."""
    shutil.rmtree(folder, ignore_errors=True)
    data = {"subset": "file", "file": None, "rows": rows, "sha256": "made up", "split_seed": 0}
    manifest = Manifest.begin(
        folder,
        plan_files.STAGE,
        {"target": target.identity, "source": source.identity, "data": data, "settings": {"epsilon": EPSILON}},
    )
    models = {"target": target, "source": source}
    for name, model in models.items():
        made = {
            (side, layer): torch.randn(rows, model.layout.size(side))
            for layer in range(model.layout.n_layers)
            for side in planned_sides(ATTENTION)
        }
        strengths = plan_files.write_activations(folder, name, made, torch.zeros(rows, dtype=torch.bool), half=False)
        if name == "target":
            plan_files.write_selection(folder, strengths)
    for side in planned_sides(ATTENTION):
        write_uniform_plans(folder, side, target, source)
    write_rows_read(folder, {"calibration": []})
    manifest.finish(shapes={name: vars(model.layout) for name, model in models.items()}, rows=rows)
    return folder


def write_uniform_plans(folder: Path, side: str, target: Checkpoint, source: Checkpoint) -> None:
    """The file of one side's plans, with uniform layer plans and the potentials of a constant cost."""
    L, M = target.layout.n_layers, source.layout.n_layers
    f, g = (
        torch.full((L, M, n), -EPSILON * math.log(n), dtype=torch.float64)
        for n in (target.layout.size(side), source.layout.size(side))
    )
    path = plan_files.plans_file(folder, side)
    path.parent.mkdir(exist_ok=True)
    write_safetensors(
        path,
        {
            "f": f,
            "g": g + EPSILON,
            "n_iters": torch.ones(L, M, dtype=torch.int32),
            "error": torch.zeros(L, M, dtype=torch.float64),
            "converged": torch.ones(L, M, dtype=torch.bool),
            "layer_cost": torch.ones(L, M, dtype=torch.float64),
            "P": torch.full((L, M), 1 / (L * M), dtype=torch.float64),
        },
    )


def pair_seconds(folder: Path, source: Checkpoint, top_k: int) -> float:
    """Seconds for the transported weights of one target layer from one source layer: those of the second of two runs,
    because the first one warms up."""
    plans = PlanDirectory(folder)
    indices = {c: select(plans.strongest(one.selected_side, 0), top_k) for c, one in PROJECTIONS.items()}
    for _ in range(2):
        transport = Transport(plans, source, FusionSettings(p_topk=1))
        start = time.perf_counter()
        transport.transported(0, indices)
        seconds = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
