"""What transformers says goes to our log, and its bars look like ours."""

from __future__ import annotations

from typing import Any

from core.progress import Progress

# Loading a small model takes no bar.
BAR_AFTER_S = 2


def redirect_transformers() -> None:
    """Let the library write its warnings to the log of the command, and draw its bars as ours."""
    from transformers.utils import logging as library

    library.disable_default_handler()
    library.enable_propagation()
    library.set_tqdm_hook(_bar)


def _bar(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Progress:
    """A bar in place of one of the library's, which counts tensors or files without saying which."""
    return Progress(*arguments, **{**options, "unit": "items", "delay": BAR_AFTER_S})
