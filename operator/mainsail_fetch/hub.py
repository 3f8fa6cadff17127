"""Models of the Hugging Face Hub, through its own client: tokens, resuming, mirrors (HF_ENDPOINT), Xet storage.

HF_TOKEN, where the Secret has it, is the client's own variable.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mainsail_fetch.errors import FetchError, of_status
from mainsail_fetch.remote import RemoteFile
from mainsail_fetch.source import HubSource

_OTHER_FRAMEWORKS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".gguf", ".mlmodel")
"""Not read by the engine where a repository is fetched as a folder; a .gguf is fetched when the URI names it."""


class Hub:
    def __init__(self, source: HubSource) -> None:
        self._source = source
        # The client reads its variables when it is imported; here they count when it is used.
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN"))
        self._what = f"hf://{source.repository} (revision {source.revision})"
        self._commit = source.revision

    def files(self) -> list[RemoteFile]:
        try:
            info = self._api.model_info(
                self._source.repository, revision=self._source.revision, files_metadata=True, timeout=15
            )
        except Exception as error:
            raise self._meant(error) from error
        self._commit = info.sha or self._source.revision
        found = [RemoteFile(one.rfilename, one.size or 0) for one in info.siblings or []]
        if self._source.path:
            found = [one for one in found if one.path == self._source.path]
            if not found:
                raise FetchError("ModelNotFound", f"{self._what} has no file {self._source.path}")
            return found
        found = [one for one in found if not _unused(one.path)]
        if not any(one.path.endswith(".safetensors") for one in found):
            raise FetchError("ModelNotFound", f"{self._what} has no *.safetensors files: name one of its .gguf files "
                             f"in the URI (hf://{self._source.repository}/FILE.gguf)")  # fmt: skip
        return found

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        try:
            # One commit for all files, whatever is pushed to the branch meanwhile.
            self._api.hf_hub_download(  # pyright: ignore[reportUnknownMemberType]
                self._source.repository, file.path, revision=self._commit, local_dir=folder
            )
        except Exception as error:
            raise self._meant(error) from error
        wanted = folder / (file.path.rsplit("/", 1)[-1] if self._source.path else file.path)
        if wanted != folder / file.path:
            (folder / file.path).rename(wanted)

    def _meant(self, error: Exception) -> Exception:
        """What an error of the client means; the error itself where it is about the disk."""
        if isinstance(error, GatedRepoError):
            return FetchError("CredentialsRefused", f"{self._what} is gated: accept its terms on the Hub, and put a "
                              "token of that account as HF_TOKEN into the Secret of spec.model.secretRef")  # fmt: skip
        if isinstance(error, RevisionNotFoundError):
            return FetchError("ModelNotFound", f"{self._what}: there is no such revision")
        if isinstance(error, RepositoryNotFoundError):
            return FetchError("ModelNotFound", f"{self._what} does not exist, or is private: then put a token that may "
                              "read it as HF_TOKEN into the Secret that spec.model.secretRef names")  # fmt: skip
        if isinstance(error, LocalEntryNotFoundError | httpx2.TransportError):
            return FetchError("SourceUnreachable", f"{self._api.endpoint} cannot be reached: {_first(error)}")
        if isinstance(error, EntryNotFoundError):
            return FetchError("ModelNotFound", f"{self._what}: {_first(error)}")
        if isinstance(error, HfHubHTTPError):
            return of_status(error.response.status_code, self._what, error.server_message or "")
        return error


def _unused(path: str) -> bool:
    return path.startswith((".", "original/", "onnx/")) or path.endswith(_OTHER_FRAMEWORKS)


def _first(error: Any) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
