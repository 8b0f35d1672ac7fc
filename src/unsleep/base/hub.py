"""Files from the Hugging Face hub, or from its local cache where the hub is unreachable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unsleep.core import BadInput

SECONDS = 10.0
"""Timeout for listing a repository, in seconds."""

FAILURES = (HTTPError, EntryNotFoundError, HFValidationError, OSError)
"""Exceptions of huggingface_hub for a missing repository, a missing file or an unreachable hub."""


def listing(repo: str, revision: str | None = None) -> list[str] | None:
    """The files of a repository; `None` where the hub is unreachable, so that only the cache is available.

    Raises `BadInput` for a repository that does not exist, has no such revision or is gated.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        found = HfApi().model_info(repo, revision=revision, timeout=SECONDS)
    except GatedRepoError:
        raise BadInput(
            f"{repo} is gated; ask for access on its page, then log in with `hf auth login`, or give a folder"
        ) from None
    except RevisionNotFoundError:
        raise BadInput(f"{repo} has no revision {revision!r}; expected a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise BadInput(
            f"the model hub has no {repo!r}, or it is private; expected a hub id such as owner/name, or a folder"
        ) from None
    except FAILURES:
        return None
    return [sibling.rfilename for sibling in found.siblings or ()]


def fetch(repo: str, files: Sequence[str] | None = None, revision: str | None = None) -> Path:
    """The local folder of a repository's snapshot, after downloading those of `files` (patterns) that it has.

    With `None` nothing is downloaded: the folder holds what is cached. Raises `BadInput` naming the repository where it
    does not exist, or is neither reachable nor cached.
    """
    try:
        if files is None:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except FAILURES as error:
        at = f" at revision {revision!r}" if revision else ""
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}"
        raise BadInput(
            f"{repo}{at} is neither a local folder nor in the cache at {constants.HF_HUB_CACHE}, and the model hub has "
            f"no such repository or cannot be reached ({why}); give a folder, or download it where there is a network"
        ) from error
