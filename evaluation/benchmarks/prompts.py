"""How a model is prompted: in its chat template, always at the same date, or by the plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from core.runs.command_line import Parser
from core.texts.tokens import templated
from evaluation.evaluated_model import EvaluatedModel

CHAT, PLAIN = "chat", "plain"
# Policy -> what score files and tables call it.
POLICY_NAMES = {CHAT: "chat template", PLAIN: "plain prompt"}


@dataclass(frozen=True)
class PromptSettings:
    """What a user may decide about prompts.

    Attributes:
        policy: `chat` or `plain`.
        llama_name: whether MalayMMLU prompts the model as one whose name contains "llama": yes, no, or auto.
    """

    policy: str = CHAT
    llama_name: str = "auto"


def prompt_flags(parser: Parser, llama_name: bool) -> None:
    """Add `--prompt` to a parser, and `--llama-name` for the commands that read it."""
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
            help="MalayMMLU prompts models whose name contains llama in another way; auto: by --model, or "
            "by the name of the target for a checkpoint of ours",
        )


def chat_template(model: EvaluatedModel) -> str:
    """The model's chat template. Raises UserError when it has none, because any other would be our invention."""
    template = model.tokenizer.chat_template
    if not template:
        raise UserError(
            f"{model.checkpoint.name} has no chat template, expected a chat model; put "
            "chat_template.jinja of its instruction-tuned version into its folder, or give --prompt plain"
        )
    return template if isinstance(template, str) else template["default"]


def rendered(tokenizer: Any, prompt: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    """A prompt as one turn of a user in the chat template, up to where the answer begins; always at the same date.

    The templates of vision-language models take a message as a list of parts and silently drop plain text, so the
    prompt is rendered in either form until it shows.

    Args:
        earlier: (role, text) of the turns before it.
    Raises:
        UserError: the template refuses the prompt, or shows it in neither form.
    """
    refused: UserError | None = None
    said = [*earlier, ("user", prompt)]
    for as_parts in (False, True):
        turns = [
            {"role": role, "content": [{"type": "text", "text": content}] if as_parts else content}
            for role, content in said
        ]
        try:
            text = templated(tokenizer, turns, prompt, tokenize=False, add_generation_prompt=True)
        except UserError as error:  # the template may still take the other form
            refused = error
            continue
        if prompt.strip() in text:
            return text
    raise refused or UserError(
        "the chat template leaves out what the user says, as a string and as a list of parts; correct it, or give "
        "--prompt plain"
    )
