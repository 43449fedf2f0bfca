"""A model by its hub id: the configuration and the one file that holds the head are fetched."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from flashhead_dist.model_source.errors import ModelSourceError


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form "organisation/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def fetch_file(repo_id: str, name: str) -> Path:
    """Path of one file of a hub model, downloaded where it is not cached.

    A file that the model does not have gives a path that does not exist.
    Raises ModelSourceError where the hub cannot be reached, or refuses.
    """
    try:
        return Path(hf_hub_download(repo_id, name))
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo_id) from error
    except EntryNotFoundError:
        return Path(repo_id) / name
    except (OSError, ValueError, RuntimeError) as error:
        raise _refused(repo_id, error) from error


def fetch_all(repo_id: str) -> Path:
    """Folder with the whole model, weights as safetensors alone.

    Raises ModelSourceError where the hub cannot be reached, or refuses.
    """
    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "tokenizer*"])
        )
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo_id) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _refused(repo_id, error) from error


def _unreachable(repo_id: str) -> ModelSourceError:
    return ModelSourceError(
        f"{repo_id} is neither a local path nor in the Hugging Face cache, and the hub cannot be "
        "reached; connect, or give a local folder or .gguf file with --model."
    )


def _refused(repo_id: str, error: Exception) -> ModelSourceError:
    if isinstance(error, GatedRepoError):
        reason, remedy = "is gated", "accept its terms on the hub and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        reason, remedy = "is neither a local path nor a model on the hub", "check its spelling"
    else:
        reason = f"cannot be fetched from the hub ({type(error).__name__})"
        remedy = "connect, or give a local folder or .gguf file with --model"
    return ModelSourceError(f"{repo_id} {reason}; {remedy}.")
