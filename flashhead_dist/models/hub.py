"""A model by its hub id: the configuration and the one file that holds the head are fetched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

# HTTPError is that of the HTTP library beneath, which is another one from version to version.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from flashhead_dist.errors import ModelSourceError

_TIMEOUT_S = 10.0
_BODY_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form "organisation/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


class HubModel:
    """The files of one revision of a hub model, or of its cached copy where there is no hub."""

    def __init__(self, repo_id: str) -> None:
        """Ask the hub once what there is: downloads retry for half a minute when it is away.

        Raises ModelSourceError where the model does not exist, or is neither reachable nor cached.
        """
        self._repo_id = repo_id
        try:
            info = HfApi().model_info(repo_id, timeout=_TIMEOUT_S)
        except RepositoryNotFoundError as error:
            raise self._refused(error) from error
        except (HTTPError, OSError) as error:
            self._revision = None
            self._cached = self._cached_folder(error)
        else:
            self._revision = info.sha
            self._names = {sibling.rfilename for sibling in info.siblings or []}

    def fetch(self, name: str) -> Path:
        """Path of one file, downloaded where it is not cached; it need not exist.

        Raises ModelSourceError where the hub refuses.
        """
        if self._revision is None:
            return self._cached / name
        if name not in self._names:
            return Path(self._repo_id) / name
        return self._downloaded(hf_hub_download, filename=name)

    def fetch_all(self) -> Path:
        """Folder with everything that the body needs, weights as safetensors alone.

        Raises ModelSourceError where the hub refuses.
        """
        if self._revision is None:
            return self._cached
        return self._downloaded(snapshot_download, allow_patterns=_BODY_FILES)

    def _downloaded(self, download: Callable[..., str], **options: Any) -> Path:
        try:
            return Path(download(self._repo_id, revision=self._revision, **options))
        except (HTTPError, OSError) as error:
            raise self._refused(error) from error

    def _cached_folder(self, error: Exception) -> Path:
        try:
            return Path(snapshot_download(self._repo_id, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ModelSourceError(
                f"{self._repo_id} is neither a local path nor in the Hugging Face cache, and the "
                "hub cannot be reached; connect, or give a local folder or .gguf file with --model."
            ) from error

    def _refused(self, error: Exception) -> ModelSourceError:
        if isinstance(error, GatedRepoError):
            reason, remedy = "is gated", "accept its terms on the hub and run `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason, remedy = "is neither a local path nor a model on the hub", "check its spelling"
        else:
            reason = f"cannot be fetched from the hub ({type(error).__name__})"
            remedy = "connect, or give a local folder or .gguf file with --model"
        return ModelSourceError(f"{self._repo_id} {reason}; {remedy}.")
