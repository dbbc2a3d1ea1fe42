"""The licence of a model, read from its folder, and what the licences of several models say together."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)

# The model card. Its front matter states the licence.
CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
UNSTATED = {"unknown", "other"}
MAX_LICENCE_NAME = 80


def read_licence(folder: Path, hub_id: str | None = None) -> dict[str, Any]:
    """The licence that a model folder states, as front matter {license, license_name, license_link}.

    It is read from the front matter of README.md. If there is none, the first line of a LICENSE file is its name. The
    result is empty when the folder states no licence.

    Args:
        hub_id: the model's repository on the hub, to which a relative link belongs.
    """
    from huggingface_hub.repocard import metadata_load  # takes 0.4 s to import, which only written checkpoints need

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
            return {"license": "other", "license_name": _hub_name(name[:MAX_LICENCE_NAME])}
    return {}


def _hub_name(text: str) -> str:
    """`text` in the form that the hub requires of a licence name: lower case, with hyphens in place of spaces."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _with_absolute_link(licence: dict[str, Any], hub_id: str | None) -> dict[str, Any]:
    """The licence with a link that also works in the card of another repository.

    A relative link is a file of the model's own repository. It becomes an address on the hub when the repository is
    known, and is left out otherwise.
    """
    link = licence.get("license_link")
    if link is None or str(link).startswith(("http://", "https://")):
        return licence
    rest = {key: value for key, value in licence.items() if key != "license_link"}
    return {**rest, "license_link": f"https://huggingface.co/{hub_id}/blob/main/{link}"} if hub_id else rest


def licence_text(licence: Mapping[str, Any]) -> str:
    """The licence in a word: `apache-2.0`; for `other` its name or its link; `unknown` when nothing is stated."""
    stated = licence.get("license", "unknown")
    text = ", ".join(stated) if isinstance(stated, list) else stated
    if text == "other":
        text = licence.get("license_name") or licence.get("license_link") or text
    return text


def licence_warning(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """One line of warning when the licences of the models differ or one of them is unknown, otherwise None.

    Args:
        models: role (`target`, `source`, `source_base`) -> `core.runs.lineage.describe_model`.
    """
    texts = {role: licence_text(model["licence"]) for role, model in models.items()}
    by_role = ", ".join(f"{role.replace('_', ' ')} {text}" for role, text in texts.items())
    if len({text.lower() for text in texts.values()}) > 1:
        return f"licences differ: {by_role}; check that both allow what you plan"
    if UNSTATED & set(texts.values()):
        return f"licences are not stated: {by_role}; find out whether they allow what you plan"
    return None
