"""Models in an OCI registry: the files of an artifact (layers with a title, as `oras push` makes), or of an image.

The protocol is that of github.com/opencontainers/distribution-spec: a token where the registry asks for one, the
manifest (of an index, the first one that is an image of this machine or an artifact), each layer as a blob whose
SHA-256 must be its digest. Written here because PyPI's clients take artifacts or images, not both.
Credentials: OCI_USERNAME and OCI_PASSWORD, or a Secret of type kubernetes.io/dockerconfigjson. OCI_PLAIN_HTTP=true for
a registry without TLS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import httpx2

from mainsail_fetch.errors import FetchError, of_status
from mainsail_fetch.remote import RemoteFile
from mainsail_fetch.source import OciSource

_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
              "application/vnd.oci.image.index.v1+json",
              "application/vnd.docker.distribution.manifest.list.v2+json")  # fmt: skip
_TITLE = "org.opencontainers.image.title"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_CHUNK = 1 << 20
JSON = dict[str, Any]


class Registry:
    def __init__(self, source: OciSource, environment: Mapping[str, str] = os.environ) -> None:
        self._source = source
        self._what = f"oci://{source.registry}/{source.repository} ({source.reference})"
        scheme = "http" if environment.get("OCI_PLAIN_HTTP", "").lower() == "true" else "https"
        host = "registry-1.docker.io" if source.registry == "docker.io" else source.registry
        self._base = f"{scheme}://{host}/v2/{source.repository}"
        self._account = credentials(source.registry, environment)
        self._client = httpx2.Client(timeout=httpx2.Timeout(60, connect=10), follow_redirects=True)
        self._token = ""
        self._titles: dict[str, str] = {}
        """Digest → the file that the layer is, of an artifact."""

    def files(self) -> list[RemoteFile]:
        manifest = self._manifest(self._source.reference)
        layers = cast("list[JSON]", manifest.get("layers") or [])
        if not layers:
            raise FetchError("ModelNotFound", f"{self._what} has no layers")
        for layer in layers:
            title = str(cast(JSON, layer.get("annotations") or {}).get(_TITLE) or "")
            if title and ".." not in title.split("/") and not title.startswith("/"):
                self._titles[str(layer["digest"])] = title
        return [RemoteFile(str(layer["digest"]), int(layer.get("size") or 0)) for layer in layers]

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        title = self._titles.get(file.path)
        target = folder / (title or f".layers/{file.path.partition(':')[2]}")
        if not (target.is_file() and target.stat().st_size == file.size):
            self._blob(file.path, target)
        if title is None:
            _unpack(target, folder, self._what)

    def _manifest(self, reference: str) -> JSON:
        response = self._get(f"{self._base}/manifests/{reference}", {"accept": ", ".join(_MANIFESTS)})
        try:
            found: JSON = response.json()
        except ValueError:
            raise FetchError("SourceDamaged", f"{self._what}: the manifest is no JSON") from None
        if "manifests" not in found:
            return found
        machine = _MACHINES.get(platform.machine(), platform.machine())
        choices = cast("list[JSON]", found["manifests"])
        for choice in choices:
            wanted = cast(JSON, choice.get("platform") or {"architecture": machine})
            if wanted.get("architecture") in (machine, "unknown"):
                return self._manifest(str(choice["digest"]))
        raise FetchError("ModelNotFound", f"{self._what} has nothing for this machine ({machine})")

    def _blob(self, digest: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".draft")
        seen = hashlib.sha256()
        try:
            with self._client.stream("GET", f"{self._base}/blobs/{digest}", headers=self._headers()) as response:
                if response.status_code >= 400:
                    raise of_status(response.status_code, f"{self._what}, layer {digest[:19]}")
                with draft.open("wb") as out:
                    for chunk in response.iter_bytes(_CHUNK):
                        seen.update(chunk)
                        out.write(chunk)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        if f"sha256:{seen.hexdigest()}" != digest:
            draft.unlink()
            raise FetchError("SourceDamaged", f"{self._what}: layer {digest[:19]} arrived with another content")
        draft.rename(target)

    def _get(self, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        try:
            response = self._client.get(url, headers={**headers, **self._headers()})
            if response.status_code == 401 and not self._token:
                self._authenticate(response.headers.get("www-authenticate", ""))
                response = self._client.get(url, headers={**headers, **self._headers()})
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise of_status(response.status_code, self._what)
        return response

    def _headers(self) -> dict[str, str]:
        return {"authorization": self._token} if self._token else {}

    def _authenticate(self, challenge: str) -> None:
        """Basic as it is; Bearer by a token from where the registry says."""
        basic = base64.b64encode(":".join(self._account).encode()).decode() if self._account else ""
        if challenge.lower().startswith("basic"):
            self._token = f"Basic {basic}"
            return
        asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        if not asked.get("realm", "").startswith(("https://", "http://")):
            raise of_status(401, self._what)
        query = {name: asked[name] for name in ("service", "scope") if name in asked}
        query.setdefault("scope", f"repository:{self._source.repository}:pull")
        response = self._client.get(asked["realm"], params=query, headers={"authorization": f"Basic {basic}"} if basic
                                    else {})  # fmt: skip
        if response.status_code >= 400:
            raise of_status(response.status_code, self._what)
        found: JSON = response.json()
        self._token = f"Bearer {found.get('token') or found.get('access_token')}"

    def _unreachable(self, error: Exception) -> FetchError:
        return FetchError("SourceUnreachable", f"{self._what}: {error or type(error).__name__}")


def credentials(registry: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password for a registry, from the Secret's keys as the environment has them."""
    if environment.get("OCI_USERNAME"):
        return environment["OCI_USERNAME"], environment.get("OCI_PASSWORD", "")
    text = environment.get("OCI_DOCKER_CONFIG", "")
    if not text:
        return None
    try:
        accounts = cast("dict[str, JSON]", json.loads(text)["auths"])
    except (ValueError, KeyError, TypeError):
        raise FetchError("CredentialsRefused", "the Secret's .dockerconfigjson cannot be read: make it with "
                         "`kubectl create secret docker-registry`") from None  # fmt: skip
    names = (registry, f"https://{registry}", "https://index.docker.io/v1/" if registry == "docker.io" else registry)
    found = next((accounts[name] for name in names if name in accounts), None)
    if found is None:
        return None
    if found.get("auth"):
        user, _, password = base64.b64decode(str(found["auth"])).decode().partition(":")
        return user, password
    return str(found.get("username", "")), str(found.get("password", ""))


def _unpack(layer: Path, folder: Path, what: str) -> None:
    """The layer's files into the folder; tarfile's filter refuses names and links that lead out of it, and devices."""
    try:
        with tarfile.open(layer) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise FetchError("SourceDamaged", f"{what}: a layer is no tar archive ({error})") from error
    layer.unlink()
