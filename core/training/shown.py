"""What a training shows: a bar of updates with the last loss; the Trainer's own figures go to the log file."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from core.progress import Progress

log = logging.getLogger(__name__)


class TrainingBar(TrainerCallback):
    """Takes the place of what the Trainer shows, which prints a dictionary at every update.

    Args:
        what: is trained, as the bar names it.
    """

    def __init__(self, what: str):
        self.what = what
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, at the update from which a resumed training goes on."""
        if state.is_world_process_zero:
            self.bar = Progress(desc=self.what, total=state.max_steps, initial=state.global_step, unit="updates")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count an update."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the loss, and keep all figures."""
        if state.is_world_process_zero and logs:
            log.debug("update %d: %s", state.global_step, logs)
            if self.bar is not None and "loss" in logs:
                self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def close(self) -> None:
        """Close the bar, however the training ended."""
        if self.bar is not None:
            self.bar.close()
