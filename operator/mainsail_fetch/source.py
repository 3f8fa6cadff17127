"""What a model's URI means (pure): which store, which files, and under which name a copy is kept.

hf://ORGANIZATION/NAME[/PATH]      a repository of the Hugging Face Hub, or one file of it
s3://BUCKET/PREFIX                 the objects below a prefix, or one object
oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]   the files of an artifact, or of an image's layers
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PATH = r"[^/\s?#][^\s?#]*"
HF = rf"hf://(?P<repository>{_NAME}/{_NAME})(?:/(?P<path>{_PATH}))?"
S3 = rf"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])/(?P<path>{_PATH})"
OCI = (
    r"oci://(?P<registry>[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?)/(?P<repository>[a-z0-9][a-z0-9._/-]*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True)
class HubSource:
    repository: str
    path: str
    """One file; empty: the whole repository."""
    revision: str


@dataclass(frozen=True, slots=True)
class S3Source:
    bucket: str
    path: str
    """A prefix, or one object."""


@dataclass(frozen=True, slots=True)
class OciSource:
    registry: str
    repository: str
    reference: str
    """A tag or a digest."""


Source = HubSource | S3Source | OciSource


def parse(uri: str, revision: str = "main") -> Source | None:
    """None for a URI that is none of these. revision: of a repository on the Hub."""
    if ".." in uri.split("/"):
        return None
    if match := re.fullmatch(HF, uri):
        return HubSource(match["repository"], match["path"] or "", revision)
    if match := re.fullmatch(S3, uri):
        return S3Source(match["bucket"], match["path"].rstrip("/"))
    if match := re.fullmatch(OCI, uri):
        return OciSource(match["registry"], match["repository"], match["digest"] or match["tag"] or "latest")
    return None


def folder(uri: str, revision: str) -> str:
    """The name that a copy is kept under: to be read by people, and different for different models."""
    digest = hashlib.sha256(f"{uri} {revision}".encode()).hexdigest()[:10]
    words = re.sub(r"[^A-Za-z0-9.]+", "-", uri.partition("://")[2]).strip("-.")
    return f"{words[:80].strip('-.')}-{digest}"


def file_in(source: Source) -> str:
    """The one file that is meant, relative to the folder; empty when the folder is the model."""
    path = "" if isinstance(source, OciSource) else source.path
    name = path.rsplit("/", 1)[-1]
    return name if name.endswith(".gguf") else ""
