"""Models in S3 and what speaks its protocol, through obstore: one wheel around the Rust crate object_store.

The Secret's keys are AWS' own: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, and
AWS_ENDPOINT_URL for another server. Without keys the requests are signed with what the pod's account gives, or not at
all where AWS_SKIP_SIGNATURE is true.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import certifi
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from mainsail_fetch.errors import FetchError
from mainsail_fetch.remote import RemoteFile
from mainsail_fetch.source import S3Source

_CHUNK = 8 << 20


def trusted(environment: Mapping[str, str], paths: ssl.DefaultVerifyPaths) -> dict[str, str]:
    """What to add to the environment so that obstore finds certificates, without which it does not even speak plain
    HTTP: certifi's where the image has none of its own and nobody named any."""
    named = "SSL_CERT_FILE" in environment or "SSL_CERT_DIR" in environment
    there = bool(paths.cafile) or bool(paths.capath and any(Path(paths.capath).iterdir()))
    return {} if named or there else {"SSL_CERT_FILE": certifi.where()}


class Bucket:
    def __init__(self, source: S3Source) -> None:
        self._source = source
        self._what = f"s3://{source.bucket}/{source.path}"
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        options: dict[str, Any] = {
            "client_options": {"timeout": timedelta(minutes=10), "connect_timeout": timedelta(seconds=10),
                               "allow_http": plain},
            "retry_config": {"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        }  # fmt: skip
        os.environ.update(trusted(os.environ, ssl.get_default_verify_paths()))
        try:
            self._store = S3Store(source.bucket, **options)
        except BaseError as error:
            raise FetchError("SourceUnreachable", f"{self._what}: {' '.join(str(error).split())[:400]}") from error

    def files(self) -> list[RemoteFile]:
        path = self._source.path
        try:
            if path.endswith(".gguf"):
                return [RemoteFile(path.rsplit("/", 1)[-1], obstore.head(self._store, path)["size"])]
            prefix = f"{path}/"
            found = [
                RemoteFile(one["path"].removeprefix(prefix), one["size"])
                for page in obstore.list(self._store, prefix)  # pyright: ignore[reportUnknownMemberType]
                for one in page
                if not one["path"].endswith("/")
            ]
        except (BaseError, FileNotFoundError) as error:
            raise self._meant(error) from error
        if not found:
            raise FetchError("ModelNotFound", f"{self._what}/ has no objects")
        return found

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        target = folder / file.path
        if target.is_file() and target.stat().st_size == file.size:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        key = self._source.path if self._source.path.endswith(".gguf") else f"{self._source.path}/{file.path}"
        draft = target.with_name(target.name + ".draft")
        try:
            with draft.open("wb") as out:
                for chunk in obstore.get(self._store, key).stream(_CHUNK):
                    out.write(chunk)
        except (BaseError, FileNotFoundError) as error:
            raise self._meant(error) from error
        draft.rename(target)

    def _meant(self, error: Exception) -> FetchError:
        text = str(error)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or any(
            word in text for word in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken")
        ):
            return FetchError("CredentialsRefused", f"{self._what}: the credentials are missing, wrong or not enough: "
                              "put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into the Secret of "
                              "spec.model.secretRef")  # fmt: skip
        if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text or "NoSuchKey" in text:
            return FetchError("ModelNotFound", f"{self._what} does not exist")
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        return FetchError("SourceUnreachable", f"{self._what}: {first[:400]}")
