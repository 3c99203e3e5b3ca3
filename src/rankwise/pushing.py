"""An adapter to a model hub, by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from rankwise.errors import CheckpointError, HubError
from rankwise.inspection.inspection import inspect

# A checkpoint's optimizer and random states: pickles, of no use to whoever loads the adapter.
LEFT_OUT = ("*.pt", "*.pth", "*.bin", "*.pkl", "trainer_state.json", ".*", "*/*")


def push(adapter: str | Path, repository: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload an adapter's directory as one commit, into a repository that is made where there is none.

    Pickles, hidden files and folders stay here.

    Args:
        repository: ``user/name``, or ``name`` for one of your own.
        endpoint: address of the hub; default: that of huggingface_hub, with its token.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the directory holds no adapter that can be loaded. HubError: the hub refuses, or cannot be
            reached.
    """
    inspection = inspect(adapter)
    if inspection.problems:
        raise CheckpointError(f"{adapter}: expected an adapter that can be loaded, found: {inspection.problems[0]}")
    api = HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=adapter,
            commit_message=f"Adapter {Path(adapter).resolve().name}",
            ignore_patterns=list(LEFT_OUT),
        )
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repository}: {error}") from None
    except HFValidationError as error:
        raise HubError(f"{repository}: expected a repository's name such as user/adapter, found: {error}") from None
    except (HTTPError, OSError) as error:
        said = " ".join(str(error).split())
        raise HubError(
            f"{repository}: the hub at {api.endpoint} did not take it ({said}). Look whether you are logged in "
            "(`hf auth login`) and may write there."
        ) from error
    return str(commit.commit_url)
