"""Download from and upload to the Hugging Face Hub, with errors in one line.

Tokens, cache and offline mode are those of huggingface_hub: `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`, `hf auth login`.
huggingface_hub takes a third of a second to import, and is imported when something is on the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snac_core.errors import UserError


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository on the hub, `owner/name`, and is not a path."""
    if "/" not in name:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_no_path(name: str) -> None:
    """Raise UserError for `owner/name` where there is a folder `owner`: it is a mistyped path."""
    if Path(name).parent.is_dir():
        raise UserError(f"no folder {name}; {Path(name).parent} is a folder here, so it is not looked for on the hub")


def fetch(repo_id: str, *wanted: Sequence[str], **options: Any) -> list[Path]:
    """Download files of one commit, or find them in the cache.

    `snapshot_download` would download a safetensors and a torch file where a repository has both, and offline it
    returns an incomplete snapshot without an error.

    Args:
        repo_id: `owner/name`.
        wanted: for each file its possible names; the first that exists is used.
        options: of `hf_hub_download`: `revision` (branch, tag or commit), `token`, `cache_dir`, `local_files_only`.

    Returns:
        one path per file; `commit_of` returns their commit.

    Raises:
        UserError: for a missing repository or file, without access to it, and without a network.
    """
    found: list[Path] = []
    for names in wanted:
        found.append(_first_of(repo_id, names, options))
        options["revision"] = commit_of(found[0])  # a push in between cannot mix two commits
    return found


def _first_of(repo_id: str, names: Sequence[str], options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    missing: list[Exception] = []
    for name in names:
        try:
            return Path(hf_hub_download(repo_id, name, **options))
        except EntryNotFoundError as error:  # also if nothing is cached and there is no network
            missing.append(error)
        except Exception as error:  # the HTTP libraries under different versions of the hub have no common base
            raise _refused(f"cannot fetch {repo_id!r} from the hub", error) from error
    raise _refused(f"cannot fetch {repo_id!r} from the hub: {names[0]}", missing[0]) from missing[0]


def commit_of(path: Path) -> str:
    """The commit of a file in the hub's cache: .../snapshots/<commit>/<file>."""
    return path.parent.name


def push(
    folder: Path, repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload a folder's files in one commit; create the repository and the branch `revision` if missing.

    Returns:
        the address of the repository.

    Raises:
        UserError: without a network, a token, or write access.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload model")
    except Exception as error:  # as in fetch
        raise _refused(f"cannot push to {repo_id!r}", error) from error
    return str(address)


def _refused(what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{what}: {reason or type(error).__name__}")
