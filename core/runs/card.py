"""README.md of the checkpoints we write: where the weights come from, licences, settings, results."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from core.data import HUB_IDS
from core.files import atomic_file, digest_of, read_json
from core.fusion.residual_file import RESIDUAL_FILE
from core.locks import hold, outputs_held
from core.models.checkpoints import Checkpoint

log = logging.getLogger(__name__)

CARD = "README.md"
# evaluation/compare_arms.py writes between these, and into no card that lacks them.
RESULTS_BEGIN, RESULTS_END = b"<!-- results of evaluation/compare_arms.py -->\n", b"<!-- end of results -->\n"
LICENCE_KEYS = ("license", "license_name", "license_link")
UNSTATED = {"unknown", "other"}
MAX_LICENCE_NAME = 80
REPORT_HEADINGS = {"norm_ratio": "\\|W~\\| / \\|W\\|", "explained_variance": "explained variance"}


# Models and their licences


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What cards say of one model: {name, hub_id, revision, weights, licence, loader}, for a manifest.

    `hub_id` and `revision` are None where they are not known. A local path is no name: only its last part is told.
    """
    folder, path = checkpoint.folder, Path(checkpoint.name).expanduser()
    hub_id = checkpoint.name if checkpoint.name.count("/") == 1 and not path.exists() else None
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {
        "name": hub_id or Path(os.path.abspath(path)).name,
        "hub_id": hub_id,
        "revision": commit or checkpoint.revision or _origin(folder),
        "weights": checkpoint.identity["weights"],
        "licence": read_licence(folder, hub_id),
        "loader": checkpoint.layout.family.auto,
    }


def _origin(folder: Path) -> str | None:
    """What scripts/fetch_demo_models.py recorded; in a checkpoint of ours that file is a copy from its target."""
    path = folder / "provenance.json"
    if not path.is_file() or (folder / "manifest.json").is_file():
        return None
    return read_json(path).get("origin")


def read_licence(folder: Path, hub_id: str | None = None) -> dict[str, Any]:
    """Licence of a model folder as front matter {license, license_name, license_link}; empty when it states none.

    From the front matter of README.md, else the first line of a LICENSE file.
    """
    from huggingface_hub.repocard import metadata_load

    try:
        stated = (metadata_load(folder / CARD) or {}) if (folder / CARD).is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        log.info("%s: its front matter cannot be read (%s)", folder / CARD, " ".join(str(error).split()))
        stated = {}
    licence: dict[str, Any] = {
        key: " ".join(stated[key].split()) for key in LICENCE_KEYS if isinstance(stated.get(key), str)
    }
    if isinstance(several := stated.get("license"), list):
        licence["license"] = [str(one) for one in several]
    if licence.get("license"):
        return _with_absolute_link(licence, hub_id)
    for path in sorted(folder.glob("LICEN[CS]E*")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        if name := next((line.strip() for line in lines if line.strip()), ""):
            return {"license": "other", "license_name": _slug(name[:MAX_LICENCE_NAME])}
    return {}


def _slug(text: str) -> str:
    """`text` as the hub takes licence names: lower case, no spaces."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _with_absolute_link(licence: dict[str, Any], hub_id: str | None) -> dict[str, Any]:
    """The same with a link that is right in another repository; a relative one of a local folder goes."""
    link = licence.get("license_link")
    if link is None or str(link).startswith(("http://", "https://")):
        return licence
    rest = {key: value for key, value in licence.items() if key != "license_link"}
    return {**rest, "license_link": f"https://huggingface.co/{hub_id}/blob/main/{link}"} if hub_id else rest


def licence_text(licence: Mapping[str, Any]) -> str:
    """`apache-2.0`; for `other` its name, else its link; `unknown` when nothing is stated."""
    stated = licence.get("license", "unknown")
    text = ", ".join(stated) if isinstance(stated, list) else stated
    if text == "other":
        text = licence.get("license_name") or licence.get("license_link") or text
    return text


def licence_warning(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """One line when the licences of several models differ or one is not known, else None.

    Args:
        models: role (`target`, `source`) -> `describe_model`.
    """
    texts = {role: licence_text(model["licence"]) for role, model in models.items()}
    told = ", ".join(f"{role} {text}" for role, text in texts.items())
    if len({text.lower() for text in texts.values()}) > 1:
        return f"licences differ: {told}; check that both allow what you plan"
    if UNSTATED & set(texts.values()):
        return f"licences are not stated: {told}; find out whether they allow what you plan"
    return None


def _front_matter(
    models: Mapping[str, Mapping[str, Any]], relation: str, data: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Metadata of the hub; keys without a value are None. Only hub ids are base models and data sets there."""
    bases = [model["hub_id"] for model in models.values() if model["hub_id"]]
    licences = [model["licence"] for model in models.values()]
    texts = {licence_text(licence).lower() for licence in licences}
    licence = {"license": "other"} if len(texts) > 1 else licences[0] or {"license": "unknown"}
    hub_ids = dict.fromkeys(HUB_IDS[one["subset"]] for one in data if not one["file"] and one["subset"] in HUB_IDS)
    sees = models["target"]["loader"] == "AutoModelForImageTextToText"
    return {
        "base_model": bases or None,
        "base_model_relation": relation,
        "datasets": list(hub_ids) or None,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["transport-and-merge"],
        **licence,
    }


def fused_lineage(
    target: Checkpoint, source: Checkpoint, made_from: Mapping[str, Any], fusion: dict[str, Any]
) -> dict[str, Any]:
    """Where a fused checkpoint comes from, for its card and its manifest: {models, data, settings by stage}.

    Args:
        made_from: inputs of the plan directory's manifest.
        fusion: settings of stage 2.
    """
    models = {"target": describe_model(target), "source": describe_model(source)}
    return {
        "models": models,
        "data": made_from["data"],
        "settings": {"plans": made_from["settings"], "fusion": fusion},
    }


def adapted_lineage(
    start: Checkpoint,
    before: Mapping[str, Any] | None,
    hot: bool,
    training: dict[str, Any],
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """The same of an adapted checkpoint; without `hot` only the target and a teacher are in it.

    Args:
        before: lineage of the checkpoint it starts from; None for one that is not ours.
        training: settings of stage 3.
    """
    if before is not None and hot:
        return {**before, "settings": {**before["settings"], "training": training}}
    models = {"target": describe_model(start) if before is None else before["models"]["target"]}
    if teacher is not None:
        models["teacher"] = describe_model(teacher)
    return {"models": models, "settings": {"training": training}}


# The cards


def fused_card(lineage: Mapping[str, Any], means: Mapping[str, Mapping[str, float | None]], dropped: int) -> str:
    """README.md of a fused checkpoint.

    Args:
        lineage: `fused_lineage`.
        means: projection -> figure -> mean over layers, the table that ends stage 2.
        dropped: number of source biases without a place in the target.
    """
    models = lineage["models"]
    target, source = models["target"]["name"], models["source"]["name"]
    what = f"""The attention weights of `{target}` (target) with those of `{source}` (source) transported into its
coordinates by optimal transport ([arXiv 2602.05495](https://arxiv.org/abs/2602.05495)) and mixed in. Everything else,
tokenizer and chat template included, is the target's. The weights are plain:
`{models["target"]["loader"]}.from_pretrained` loads them. `{RESIDUAL_FILE}` holds the transported part for adaptation.

The layers and neurons of the two models were matched on {_data_text(lineage["data"])}."""
    report = _report_table(means)
    if dropped:
        report += f"\n\n{dropped} source biases dropped: the target has none there."
    sections = [
        what,
        _results(),
        _models_section(models),
        f"## What was transported\n\nMeans over layers.\n\n{report}",
        _settings_section(lineage["settings"]),
    ]
    return _card(f"{target} fused with {source}", _front_matter(models, "merge", [lineage["data"]]), sections)


def adapted_card(
    lineage: Mapping[str, Any],
    data: Mapping[str, Any],
    curve: Mapping[str, Any],
    counts: Mapping[str, int],
    method: str | None,
) -> str:
    """README.md of an adapted checkpoint.

    Args:
        lineage: `adapted_lineage`.
        data: `Division.identity` of the fine-tuning rows.
        curve: `core.training.curve.curve_of`.
        counts: of `core.training.sft.sft_examples`.
        method: how a teacher took part, in words.
    """
    models, read = lineage["models"], [data]
    losses = [point["loss"] for point in curve["train"]]
    target = models["target"]["name"]
    if "source" in models:
        read.append(lineage["data"])
        title = f"{target} fused with {models['source']['name']}, fine-tuned"
        how = (
            f"Fine-tuned from `{target}` fused with `{models['source']['name']}`, by residual-frozen adaptation\n"
            f"([arXiv 2602.05495](https://arxiv.org/abs/2602.05495), section 4.3)."
        )
    elif "teacher" in models:
        title = f"{target}, fine-tuned with {models['teacher']['name']} as teacher"
        how = f"Fine-tuned from `{target}` ({method}): what a fused model has to beat."
    else:
        title = f"{target}, fine-tuned"
        how = f"Fine-tuned from `{target}` without another model: what a fused model has to beat."
    what = f"""{how}
Plain weights for stock transformers: `{models["target"]["loader"]}.from_pretrained` loads them.

- rows: {_data_text(data)}; {counts["tokens"]} tokens, {counts["trained_tokens"]} of them with loss; {counts["cut"]}
  rows cut at the length limit, {counts["left_out"]} left out because nothing in them has a loss
- training loss: {losses[0]:.4f} at the first of {len(losses)} updates, {losses[-1]:.4f} at the last
  ({digest_of(losses)[:12]})"""
    if curve["validation"]:
        before = curve["validation"][0]["loss"]
        what += f"\n- validation loss: {before:.4f} before, {curve['final_validation']:.4f} after"
    what += "\n\n![loss](loss_curve.png)"
    trained = {role: model for role, model in models.items() if role != "teacher"}
    sections = [what, _results(), _models_section(models), _settings_section(lineage["settings"])]
    # The hub's four relations are finetune, merge, adapter and quantized; only a merge has several base models.
    relation = "merge" if "source" in models else "finetune"
    return _card(title, _front_matter(trained, relation, read), sections)


def _card(title: str, front_matter: Mapping[str, Any], sections: list[str]) -> str:
    """The whole file; the hub's own library writes the front matter."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(**front_matter).to_yaml()
    return f"---\n{head}\n---\n\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def _results() -> str:
    """An empty place for the results."""
    return (RESULTS_BEGIN + RESULTS_END).decode().rstrip("\n")


def _data_text(data: Mapping[str, Any]) -> str:
    name = Path(data["file"]).name if data["file"] else data["subset"]
    return f"{data['rows']} texts of `{name}` (split seed {data['split_seed']}, SHA-256 {data['sha256'][:12]})"


def _models_section(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The models with revision and licence, and what follows from the licences."""
    lines = ["## Models and licences", "", "| role | model | revision | weights | licence |", "| --- " * 5 + "|"]
    for role, model in models.items():
        revision, licence = model["revision"] or "not recorded", licence_text(model["licence"])
        link = model["licence"].get("license_link")
        licence = f"[{licence}]({link})" if link else licence
        lines.append(f"| {role} | `{model['name']}` | {revision} | {model['weights'][:12]} | {licence} |")
    if local := [f"`{model['name']}`" for model in models.values() if not model["hub_id"]]:
        verb = "are local folders" if len(local) > 1 else "is a local folder"
        lines += ["", f"{' and '.join(local)} {verb}, hence not listed as `base_model`."]
    if warning := licence_warning(models):
        lines += ["", f"{warning[0].upper()}{warning[1:]}. The terms of every model above may bind this one."]
    return "\n".join(lines)


def _report_table(means: Mapping[str, Mapping[str, float | None]]) -> str:
    """Markdown table of stage 2's report; `-` where no layer has a figure."""
    keys = next(iter(means.values())).keys()
    lines = [
        "| projection | " + " | ".join(REPORT_HEADINGS.get(key, key.replace("_", " ")) for key in keys) + " |",
        "| --- " * (len(keys) + 1) + "|",
    ]
    for projection, mean in means.items():
        figures = ["-" if value is None else f"{value:.3g}" for value in mean.values()]
        lines.append(f"| {projection} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _settings_section(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole experiment: one line per setting of each stage."""
    lines = ["## Experiment", "", "| stage | setting | value |", "| --- " * 3 + "|"]
    for stage, used in settings.items():
        lines += [f"| {stage} | {name} | {'default' if value is None else value} |" for name, value in used.items()]
    return "\n".join(lines)


def results_section(arm: str, data: Mapping[str, Any], table: str) -> str:
    """What `add_results` puts into the card of one arm; `table` is what evaluation/compare_arms.py prints."""
    return f"""## Results

This checkpoint is the arm `{arm}`. Held out: {_data_text(data)} that neither calibration nor
fine-tuning read. The controls (`damped` to `self`) share everything with `fused` but the correspondence of the models;
`no_hot` is the same fine-tuning from the unfused target.

```text
{table}
```
"""


def add_results(folder: Path, section: str) -> None:
    """Put `section` between the card's marks, in place of an earlier one; the other bytes stay.

    A missing card, or one without our marks, is left alone. Raises UserError when the folder is being written.
    """
    path = folder / CARD
    if not path.is_file():
        return
    with outputs_held():
        hold(folder)
        head, begin, rest = path.read_bytes().partition(RESULTS_BEGIN)
        _, end, tail = rest.partition(RESULTS_END)
        if end:
            with atomic_file(path) as temporary:
                temporary.write_bytes(head + begin + section.encode() + end + tail)
