#!/usr/bin/env python
"""Peak memory of stage 2 for a 7B-shaped source and a 1B-shaped target, and what selected rows cost against dense ones.

    python scripts/bench/fusion.py [--layers 7 14 28] [--folder runs/bench_fusion] [--rows 256]

Both models are made here: bfloat16, right shapes, random attention (the source has nothing else). Potentials and layer
plans are made up as well: neither memory nor time depends on their values. Takes 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
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
from core.fusion.projections import PROJECTIONS, SIDES
from core.fusion.settings import FusionSettings
from core.fusion.transport_weights import Transport
from core.manifest import Manifest
from core.models.checkpoints import Checkpoint, open_checkpoint
from core.models.locate import INDEX_FILE
from core.runs import plan_files
from core.runs.plan_directory import PlanDirectory

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
RUN = """
import sys
from core.generate_hot_residual import main
main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 14, 28], help="source layers")
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
        folder = make_plans(arguments.folder / f"plans-{n_layers}", target, source, arguments.rows)
        fused = arguments.folder / "fused"
        shutil.rmtree(fused, ignore_errors=True)
        command = [
            "--target-model",
            target.folder,
            "--source-model",
            source.folder,
            "--hot-dir",
            folder,
            "--top-k",
            TOP_K,
            "--max-shard-size",
            arguments.max_shard_size,
            "--output-dir",
            fused,
        ]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", RUN, *map(str, command)], cwd=ROOT, text=True, check=True, capture_output=True
        )
        print(
            f"{n_layers} source layers: peak {int(done.stdout.split()[-1]) / 2**20:.2f} GiB, "
            f"{time.perf_counter() - start:.0f} s"
        )
    for what, top_k in (("selected", TOP_K), ("dense", 0)):
        print(f"one pair of layers, all projections, {what}: {pair_seconds(folder, source, top_k):.2f} s")
    shutil.rmtree(arguments.folder)


def make_model(folder: Path, config: dict[str, Any], whole: bool = False) -> Checkpoint:
    """A bfloat16 checkpoint in shards; `whole` adds embeddings, MLPs and norms to the attention."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    weight_map: dict[str, str] = {}
    n_layers, inner = config["num_hidden_layers"], config["intermediate_size"]
    for start in tqdm(range(0, n_layers, SHARD_LAYERS), desc=f"making {folder.name}"):
        shard: dict[str, torch.Tensor] = {}
        if whole and start == 0:
            shard["model.embed_tokens.weight"] = torch.zeros(config["vocab_size"], hidden, dtype=torch.bfloat16)
            shard["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for layer in range(start, min(start + SHARD_LAYERS, n_layers)):
            prefix = f"model.layers.{layer}."
            shapes = {
                "q": (heads * head, hidden),
                "k": (kv * head, hidden),
                "v": (kv * head, hidden),
                "o": (hidden, heads * head),
            }
            for projection, shape in shapes.items():
                name = f"{prefix}self_attn.{projection}_proj"
                shard[f"{name}.weight"] = (torch.randn(shape) * 0.02).bfloat16()
                if config["model_type"] == "qwen2" and projection != "o":
                    shard[f"{name}.bias"] = torch.zeros(shape[0], dtype=torch.bfloat16)
            if whole:
                for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                    shard[f"{prefix}mlp.{name}_proj.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
                for name in ("input_layernorm", "post_attention_layernorm"):
                    shard[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{start:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return open_checkpoint(str(folder))


def make_plans(folder: Path, target: Checkpoint, source: Checkpoint, rows: int) -> Path:
    """A plan directory with random activations, uniform potentials and layer plans that use every source layer."""
    shutil.rmtree(folder, ignore_errors=True)
    data = {"subset": "file", "file": None, "rows": rows, "sha256": "made up", "split_seed": 0}
    manifest = Manifest.begin(
        folder,
        plan_files.STAGE,
        {"target": target.identity, "source": source.identity, "data": data, "settings": {"epsilon": 0.1}},
    )
    models = {"target": target, "source": source}
    for name, model in models.items():
        made = {
            (side, layer): torch.randn(rows, model.layout.size(side))
            for layer in range(model.layout.n_layers)
            for side in SIDES
        }
        strengths = plan_files.write_activations(folder, name, made, torch.zeros(rows, dtype=torch.bool), half=False)
        if name == "target":
            plan_files.write_selection(folder, strengths)
    L, M = (model.layout.n_layers for model in models.values())
    for side in SIDES:
        n, m = (model.layout.size(side) for model in models.values())
        f, g = (
            torch.full((L, M, size), -0.1 * torch.log(torch.tensor(float(size))).item(), dtype=torch.float64)
            for size in (n, m)
        )
        path = plan_files.plans_file(folder, side)
        path.parent.mkdir(exist_ok=True)
        write_safetensors(
            path,
            {
                "f": f,
                "g": g + 0.1,
                "n_iters": torch.ones(L, M, dtype=torch.int32),
                "error": torch.zeros(L, M, dtype=torch.float64),
                "converged": torch.ones(L, M, dtype=torch.bool),
                "layer_cost": torch.ones(L, M, dtype=torch.float64),
                "P": torch.full((L, M), 1 / (L * M), dtype=torch.float64),
            },
        )
    manifest.finish(shapes={name: vars(model.layout) for name, model in models.items()}, rows=rows)
    return folder


def pair_seconds(folder: Path, source: Checkpoint, top_k: int) -> float:
    """Seconds for the transported weights of one target layer from one source layer, the second of two times."""
    opened = PlanDirectory(folder)
    for _ in range(2):
        transport = Transport(opened, source, FusionSettings(p_topk=1))
        indices = {c: opened.strongest(place.selected_side, 0) for c, place in PROJECTIONS.items()}
        indices = {c: index[: top_k or None].sort().values for c, index in indices.items()}
        start = time.perf_counter()
        transport.transported(0, indices)
        seconds = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
