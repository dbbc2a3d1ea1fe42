"""The model hub: what its refusals mean, and pushing a finished checkpoint."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from core.errors import UserError
from core.files import TEMPORARY

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5
# What only a killed run needs: finished layers of stage 2, training checkpoints of stage 3, half-written files.
RESUME_FILES = ["parts/*", "checkpoints/*", f"{TEMPORARY}*", f"*/{TEMPORARY}*"]


def hub_reason(error: BaseException) -> str:
    """What the hub, or the way to it, said: one line, without a full stop."""
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(message.split()).rstrip(".")


def hub_refusal(name: str, revision: str | None, error: BaseException) -> str | None:
    """The hub's answer to a request for model `name`, in one line with the fix; None when it gave no answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answer = error if isinstance(error, HfHubHTTPError) else error.__cause__  # a download wraps some answers
    if not isinstance(answer, HfHubHTTPError):
        return None
    reason, page = hub_reason(answer), f"{constants.ENDPOINT}/{name}"
    if isinstance(answer, GatedRepoError):
        return f"model {name} is gated ({reason}); accept its terms at {page}, then log in with `hf auth login`"
    if isinstance(answer, RepositoryNotFoundError):
        return (
            f"the hub has no model {name}, or it is private ({reason}); check the id, or log in with "
            f"`hf auth login` as someone who may read it"
        )
    if isinstance(answer, RevisionNotFoundError):
        return f"model {name} has no revision {revision} ({reason}); give a branch, tag or commit of {page}"
    if answer.response.status_code in (401, 403) and not isinstance(answer, DisabledRepoError):
        return f"the hub refuses model {name} ({reason}); log in with `hf auth login` and a token that may read it"
    return f"the hub does not give model {name} ({reason}); try again later, or use a local copy"


def check_repo_id(repo_id: str | None) -> None:
    """Refuse (UserError) what cannot be the id of a hub repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"push_to_hub is no repository id: {hub_reason(error)}") from None


def push_folder(folder: Path, repo_id: str | None) -> None:
    """Upload a finished checkpoint to the hub repository `repo_id` (made private when new); None: nothing to do.

    Raises:
        UserError: the hub cannot be reached or refuses; says that the checkpoint is complete.
    """
    if repo_id is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    api = HfApi()
    try:
        with contextlib.suppress(RepositoryNotFoundError):  # a new one
            api.model_info(repo_id, timeout=HUB_TIMEOUT_S)  # fails fast where there is no hub
        repo = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            ignore_patterns=RESUME_FILES,
            commit_message="Transport and Merge checkpoint",
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: the upload library's own
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = "log in with `hf auth login` and a token that may write there; " if status in (401, 403) else ""
        raise UserError(
            f"cannot push to {repo_id} ({hub_reason(error)}); {fix}the checkpoint is complete at {folder}, "
            f"the same command pushes it again"
        ) from None
    log.info("%s is pushed to %s", folder, repo)
