"""Files from and to the Hugging Face Hub, with errors in one line.

Tokens, cache and offline mode are huggingface_hub's: `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and `hf auth login` work
as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from snac_core.errors import UserError


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository on the hub: `owner/name`, and no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def fetch(repo_id: str, *wanted: Sequence[str], **options: Any) -> list[Path]:
    """Download files of one commit, or find them in the cache.

    Args:
        repo_id: `owner/name`.
        wanted: for each file the names it may have, the first that is there counts.
        options: of `hf_hub_download`: `revision` (branch, tag or commit), `token`, `cache_dir`, `local_files_only`.

    Returns:
        a path for each; `commit_of` says which commit they are of.

    Raises:
        UserError: for a repository or file that is not there or not for this token, and without a network.
    """
    found: list[Path] = []
    for names in wanted:
        found.append(_first_of(repo_id, names, options))
        options["revision"] = commit_of(found[0])  # nobody's push in between can mix two commits
    return found


def _first_of(repo_id: str, names: Sequence[str], options: dict[str, Any]) -> Path:
    missing: list[Exception] = []
    for name in names:
        try:
            return Path(hf_hub_download(repo_id, name, **options))
        except EntryNotFoundError as error:  # also where nothing is cached and there is no network
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
    """Upload a folder's files in one commit; makes the repository and the branch `revision` where they are missing.

    Returns:
        the repository's address.

    Raises:
        UserError: without a network, a token, or the right to write there.
    """
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
