"""`gradmap export --push-to-hub`: a finished artifact becomes one commit of a Hugging Face
repository.

The token comes from HF_TOKEN, or from huggingface_hub's own login; it is never an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.card import HUB_ID
from export.integrity import read_record
from gradmap.common.console import waiting
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE


def check_hub_access(repo_id: str) -> None:
    """Raises UserError, before a long export, if the name is no repository's or the hub does not
    know us."""
    from huggingface_hub import HfApi

    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id} is no repository of the hub; name it as owner/name.")
    with _explained(repo_id), waiting("Asking the hub who we are"):
        HfApi().whoami()


def push(directory: Path, repo_id: str, private: bool = True) -> str:
    """Uploads exactly the files that gradmap.json lists, and it; returns the commit's URL.

    private: of a repository that does not exist yet. Raises UserError if the hub refuses or cannot
    be reached.
    """
    from huggingface_hub import HfApi

    record = read_record(directory)
    with _explained(repo_id), waiting(f"Uploading to {repo_id}"):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=[ARTIFACT_FILE, *record.files],
            commit_message=f"Add {record.name} ({record.format})",
        )
    return str(commit.commit_url)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence with the cure."""
    import httpx2  # what huggingface_hub 2 speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(
            "The hub needs a token to upload; set HF_TOKEN to one with write access."
        ) from None
    except HfHubHTTPError as error:
        raise UserError(_explain_status(error, repo_id)) from None
    except (httpx2.TransportError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The hub cannot be reached ({reason}); check the network, or HF_ENDPOINT."
        ) from None


def _explain_status(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "The hub does not accept the token; set HF_TOKEN to a valid one with write access."
    if status == 403:
        return f"The token may not write to {repo_id}; use one with write access, or another owner."
    return (
        f"The hub refused the upload to {repo_id} (HTTP {status}): "
        f"{str(error).strip().splitlines()[0]}"
    )
