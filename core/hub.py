"""The model hub: what its refusals mean to a user, and the upload of a finished checkpoint.

huggingface_hub takes 0.4 s to import and most commands never ask the hub, so the functions that need it import it.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from core.errors import UserError
from core.files import TEMPORARY

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5
# Files that only the continuation of a killed run needs: the finished layers of stage 2, the training checkpoints of
# stage 3, and half-written files. They are not uploaded.
RESUME_FILES = ["parts/*", "checkpoints/*", f"{TEMPORARY}*", f"*/{TEMPORARY}*"]


def hub_reason(error: BaseException) -> str:
    """What the hub, or the connection to it, gave as the reason: one line without a full stop."""
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(message.split()).rstrip(".")


def hub_refusal(name: str, revision: str | None, error: BaseException) -> str | None:
    """Turn the hub's answer to a request for model `name` into one line that says what to do about it.

    Returns None when the hub gave no answer, because it could not be reached or the error is another one.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Some downloads raise an error of their own, whose cause is the hub's answer.
    answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
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
    """Raise UserError for a string that cannot be the id of a hub repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"push_to_hub is no repository id: {hub_reason(error)}") from None


def push_folder(folder: Path, repo_id: str | None) -> None:
    """Upload a finished checkpoint to the hub repository `repo_id`, which is made private if it is new.

    Does nothing when `repo_id` is None.

    Raises:
        UserError: the hub cannot be reached or refuses. The message says that the local checkpoint is complete.
    """
    if repo_id is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    api = HfApi()
    try:
        # Asked first, because this request has a timeout and the next ones have none. A new repository is not found.
        with contextlib.suppress(RepositoryNotFoundError):
            api.model_info(repo_id, timeout=HUB_TIMEOUT_S)
        repo = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            ignore_patterns=RESUME_FILES,
            commit_message="Transport and Merge checkpoint",
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the upload library raises RuntimeError
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = "log in with `hf auth login` and a token that may write there; " if status in (401, 403) else ""
        raise UserError(
            f"cannot push to {repo_id} ({hub_reason(error)}); {fix}the checkpoint is complete at {folder}, "
            f"the same command pushes it again"
        ) from None
    log.info("%s is pushed to %s", folder, repo)
