"""README.md of the checkpoints that we write: the models and their licences, the data, the settings and the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.data import HUB_IDS
from core.files import atomic_file, digest_of
from core.fusion.controls import CONTROLS
from core.fusion.projections import ATTENTION
from core.fusion.residual_file import RESIDUAL_FILE
from core.locks import hold, outputs_held
from core.runs.licences import CARD, licence_text, licence_warning

# evaluation/compare_arms.py writes its results between these two marks. A card without them is left alone.
RESULTS_BEGIN, RESULTS_END = b"<!-- results of evaluation/compare_arms.py -->\n", b"<!-- end of results -->\n"
NO_RESULTS = (RESULTS_BEGIN + RESULTS_END).decode().rstrip("\n")
REPORT_HEADINGS = {"norm_ratio": "\\|W~\\| / \\|W\\|", "explained_variance": "explained variance"}
PAPER = "[arXiv 2602.05495](https://arxiv.org/abs/2602.05495)"


def fused_card(
    lineage: Mapping[str, Any],
    means: Mapping[str, Mapping[str, float | None]],
    dropped_biases: int,
    strength: str | None = None,
) -> str:
    """README.md of a fused checkpoint.

    Args:
        lineage: `core.runs.lineage.fused_lineage`.
        means: projection -> figure -> mean over layers, of stage 2's report.
        dropped_biases: how many biases of the source have no place in the target.
        strength: how the strength was found, as a sentence; None where it was given.
    """
    models = lineage["models"]
    target, learned = models["target"]["name"], "source_base" in models
    introduction = f"""\
{_what_was_transported(models, means)} Everything else,
tokenizer and chat template included, is the target's. The weights are plain:
`{models["target"]["loader"]}.from_pretrained` loads them. `{RESIDUAL_FILE}` holds the transported part for adaptation.

The layers and neurons of the two models were matched on {_data_text(lineage["data"])}."""
    report = f"## What was transported\n\nMeans over layers.\n\n{_report_table(means, learned)}"
    if dropped_biases:
        report += f"\n\n{dropped_biases} source biases dropped: the target has none there."
    if strength:
        report += f"\n\n{strength}."
    sections = [introduction, NO_RESULTS, _models_section(models), report, _settings_section(lineage["settings"])]
    return _card(f"{target} fused with {_given(models)}", _front_matter(models, "merge", [lineage["data"]]), sections)


def _given(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What the target was given, for titles: the source, or what it learned over its base."""
    source = models["source"]["name"]
    return f"what {source} learned over {models['source_base']['name']}" if "source_base" in models else source


def _what_was_transported(models: Mapping[str, Mapping[str, Any]], projections: Iterable[str]) -> str:
    """The first sentence of a fused checkpoint's card."""
    target, source = models["target"]["name"], models["source"]["name"]
    if "source_base" in models:
        return f"""\
The weights of `{target}` (target) plus the difference of those of `{source}` (source) to those of
`{models["source_base"]["name"]}`, which it was tuned from, transported into the target's coordinates. The layers were
matched by optimal transport ({PAPER})."""
    parts = {"attention" if name in ATTENTION else "MLP": None for name in projections}
    return f"""\
The {" and ".join(parts)} weights of `{target}` (target) with those of `{source}` (source) transported into its
coordinates by optimal transport ({PAPER}) and mixed in."""


def adapted_card(
    lineage: Mapping[str, Any],
    data: Mapping[str, Any],
    curve: Mapping[str, Any],
    counts: Mapping[str, int],
    distillation: str | None,
) -> str:
    """README.md of an adapted checkpoint.

    Args:
        lineage: `core.runs.lineage.adapted_lineage`.
        data: `Division.identity` of the fine-tuning rows.
        curve: `core.training.curve.curve_of`.
        counts: of `core.training.sft.sft_examples`.
        distillation: how a teacher took part, in words.
    """
    models, data_read = lineage["models"], [data]
    if "source" in models:
        data_read.append(lineage["data"])
    title, method = _training_method(models, distillation)
    loader = f"Plain weights for stock transformers: `{models['target']['loader']}.from_pretrained` loads them."
    introduction = f"{method}\n{loader}\n\n{_training_facts(data, curve, counts)}\n\n![loss](loss_curve.png)"
    sections = [introduction, NO_RESULTS, _models_section(models), _settings_section(lineage["settings"])]
    # A teacher gave no weights. Of the hub's four relations (finetune, merge, adapter, quantized) only a merge has more
    # than one base model.
    bases = {role: model for role, model in models.items() if role != "teacher"}
    return _card(title, _front_matter(bases, "merge" if "source" in models else "finetune", data_read), sections)


def _training_method(models: Mapping[str, Mapping[str, Any]], distillation: str | None) -> tuple[str, str]:
    """(title of the card, first sentence: what was trained from what)."""
    target = models["target"]["name"]
    if "source" in models:
        given = _given(models) if "source_base" in models else f"`{models['source']['name']}`"
        fused = f"`{target}` fused with {given}"
        return (
            f"{target} fused with {_given(models)}, fine-tuned",
            f"Fine-tuned from {fused}, by residual-frozen adaptation\n({PAPER}, section 4.3).",
        )
    if "teacher" in models:
        title = f"{target}, fine-tuned with {models['teacher']['name']} as teacher"
        return title, f"Fine-tuned from `{target}` ({distillation}): what a fused model has to beat."
    return (
        f"{target}, fine-tuned",
        f"Fine-tuned from `{target}` without another model: what a fused model has to beat.",
    )


def _training_facts(data: Mapping[str, Any], curve: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """A list of what was trained on, and of the losses."""
    losses = [point["loss"] for point in curve["train"]]
    facts = f"""\
- rows: {_data_text(data)}; {counts["tokens"]} tokens, {counts["trained_tokens"]} of them with loss; {counts["cut"]}
  rows cut at the length limit, {counts["left_out"]} left out because nothing in them has a loss
- training loss: {losses[0]:.4f} at the first of {len(losses)} updates, {losses[-1]:.4f} at the last
  ({digest_of(losses)[:12]})"""
    if curve["validation"]:
        before = curve["validation"][0]["loss"]
        facts += f"\n- validation loss: {before:.4f} before, {curve['final_validation']:.4f} after"
    return facts


def _card(title: str, front_matter: Mapping[str, Any], sections: list[str]) -> str:
    """The whole file. The hub's own library writes the front matter."""
    from huggingface_hub import ModelCardData  # takes 0.4 s to import, which only written checkpoints need

    head = ModelCardData(**front_matter).to_yaml()
    return f"---\n{head}\n---\n\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(
    models: Mapping[str, Mapping[str, Any]], relation: str, data: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The metadata that the hub reads. A key without a value is None.

    Args:
        models: role -> description of the base models. The hub accepts only its own ids, so local folders are left out.
        relation: how the checkpoint was made of its base models, as the hub calls it.
        data: identities of the rows that were read. Only data sets of the hub are listed.
    """
    bases = [model["hub_id"] for model in models.values() if model["hub_id"]]
    licences = [model["licence"] for model in models.values()]
    differ = len({licence_text(licence).lower() for licence in licences}) > 1
    licence = {"license": "other"} if differ else licences[0] or {"license": "unknown"}
    hub_ids = dict.fromkeys(HUB_IDS[one["subset"]] for one in data if not one["file"] and one["subset"] in HUB_IDS)
    takes_images = models["target"]["loader"] == "AutoModelForImageTextToText"
    return {
        "base_model": bases or None,
        "base_model_relation": relation,
        "datasets": list(hub_ids) or None,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if takes_images else "text-generation",
        "tags": ["transport-and-merge"],
        **licence,
    }


def _data_text(data: Mapping[str, Any]) -> str:
    """The rows that were read, in words. Of a file only the name is given."""
    name = Path(data["file"]).name if data["file"] else data["subset"]
    found = f"{data['rows']} texts of `{name}` (split seed {data['split_seed']}, SHA-256 {data['sha256'][:12]})"
    return f"{found} and {_data_text(data['general'])}" if "general" in data else found


def _models_section(models: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the models with their revisions and licences, and a warning about the licences if there is one."""
    lines = ["## Models and licences", "", "| role | model | revision | weights | licence |", "| --- " * 5 + "|"]
    for role, model in models.items():
        revision, licence = model["revision"] or "not recorded", licence_text(model["licence"])
        link = model["licence"].get("license_link")
        licence = f"[{licence}]({link})" if link else licence
        lines.append(
            f"| {role.replace('_', ' ')} | `{model['name']}` | {revision} | {model['weights'][:12]} | {licence} |"
        )
    if local := [f"`{model['name']}`" for model in models.values() if not model["hub_id"]]:
        verb = "are local folders" if len(local) > 1 else "is a local folder"
        lines += ["", f"{' and '.join(local)} {verb}, hence not listed as `base_model`."]
    if warning := licence_warning(models):
        lines += ["", f"{warning[0].upper()}{warning[1:]}. The terms of every model above may bind this one."]
    return "\n".join(lines)


def _report_table(means: Mapping[str, Mapping[str, float | None]], learned: bool) -> str:
    """The means of stage 2's report as a table; `-` where no layer has a figure.

    Args:
        learned: what was transported is the difference of a source to its base.
    """
    keys = next(iter(means.values())).keys()
    headings = REPORT_HEADINGS | ({"norm_ratio": "\\|W~ - W\\| / \\|W\\|"} if learned else {})
    lines = [
        "| projection | " + " | ".join(headings.get(key, key.replace("_", " ")) for key in keys) + " |",
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
    """The section that `add_results` puts into the card of one arm.

    Args:
        data: `Division.identity` of the held-out rows.
        table: what evaluation/compare_arms.py prints.
    """
    arms = {line.split()[0] for line in table.splitlines() if line.split()}
    controls = ", ".join(f"`{control}`" for control in CONTROLS if control in arms)
    return f"""## Results

This checkpoint is the arm `{arm}`. Held out: {_data_text(data)} that neither calibration nor
fine-tuning read. The controls ({controls}) share everything with `fused` but the correspondence of the models;
`no_hot` is the same fine-tuning from the unfused target.

```text
{table}
```
"""


def add_results(folder: Path, section: str) -> None:
    """Put `section` between the marks of the card in `folder`, in place of an earlier one; every other byte stays.

    A folder without a card, and a card without our marks, are left alone.

    Raises:
        UserError: another process is writing the folder.
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
