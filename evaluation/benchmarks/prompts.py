"""How a model is asked: in its chat template at a fixed date, or by the plain prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import MANIFEST, read_json
from core.runs.command_line import Parser
from core.texts.tokens import templated
from evaluation.scores import Evaluated

CHAT, PLAIN = "chat", "plain"
# What score files and tables call the two.
POLICY_NAMES = {CHAT: "chat template", PLAIN: "plain prompt"}


@dataclass(frozen=True)
class Asking:
    """What a runner may be told about the prompt.

    Attributes:
        policy: `chat` or `plain`.
        llama_name: whether MalayMMLU asks the model as one whose name contains "llama": yes, no, or auto.
    """

    policy: str = CHAT
    llama_name: str = "auto"


def asking_flags(parser: Parser, llama_name: bool) -> None:
    """Add `--prompt`, and `--llama-name` for the runners that read it."""
    parser.add_argument(
        "--prompt",
        default=CHAT,
        choices=tuple(POLICY_NAMES),
        help="chat: in the model's chat template (default); plain: for models without one",
    )
    if llama_name:
        parser.add_argument(
            "--llama-name",
            default="auto",
            choices=("yes", "no", "auto"),
            help="MalayMMLU asks models whose name contains llama in another way; auto: by --model, or "
            "by the name of the target for a checkpoint of ours",
        )


def chat_template(evaluated: Evaluated) -> str:
    """The model's chat template. Raises UserError when it has none: what it would be asked would be our invention."""
    template = evaluated.tokenizer.chat_template
    if not template:
        raise UserError(
            f"{evaluated.checkpoint.name} has no chat template, expected a chat model; put "
            "chat_template.jinja of its instruction-tuned version into its folder, or give --prompt plain"
        )
    return template if isinstance(template, str) else template["default"]


def rendered(tokenizer: Any, prompt: str) -> str:
    """One turn of a user in the chat template, up to where the answer begins; always at the same date.

    Templates of vision-language models show parts of a message and silently drop plain text.

    Raises:
        UserError: the template refuses the prompt, or it is not in what the template gives.
    """
    refused: UserError | None = None
    for content in (prompt, [{"type": "text", "text": prompt}]):
        turn = [{"role": "user", "content": content}]
        try:
            text = templated(tokenizer, turn, prompt, tokenize=False, add_generation_prompt=True)
        except UserError as error:  # the other form of the message may do
            refused = error
            continue
        if prompt.strip() in text:
            return text
    raise refused or UserError(
        "the chat template leaves out what the user says, as a string and as a list of parts; correct it, or give "
        "--prompt plain"
    )


def is_llama(asking: Asking, evaluated: Evaluated) -> tuple[bool, str]:
    """(whether the model counts as one whose name contains "llama" in any case, why)."""
    if asking.policy != CHAT:
        return False, "a plain prompt is the same for every name"
    if asking.llama_name != "auto":
        return asking.llama_name == "yes", f"--llama-name {asking.llama_name}"
    name = target_name(evaluated.checkpoint.folder) or evaluated.checkpoint.name
    return "llama" in name.lower(), f"by the name {name}"


def target_name(folder: Path) -> str | None:
    """The target of a fused or adapted checkpoint of ours, as it was given to stage 2; None for any other folder."""
    record = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    inputs = record.get("inputs", {})
    if "target" in inputs:
        return inputs["target"]["id"]
    if "model" not in inputs:
        return None
    start = inputs["model"]["id"]  # of a training: the fused checkpoint, or any model
    if inputs.get("made_by") is None:
        return start
    return target_name(Path(start)) or record.get("lineage", {}).get("models", {}).get("target", {}).get("name")
