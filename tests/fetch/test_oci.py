"""oci:// against a registry of the test's own, with and without accounts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from tests.fetch.conftest import Answer, serving

from mainsail_fetch.oci import credentials

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def digest(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def tar(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return out.getvalue()


class Registry:
    """Repository m: tags artifact, image, many (an index), bad (a layer of another content), evil (a path upwards)."""

    def __init__(self, *, account: str = "") -> None:
        self.account = account
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.url = ""
        titled = {"config.json": b"{}", "model.safetensors": b"w" * 100_000}
        self.add("artifact", *(self.layer(body, title=name) for name, body in titled.items()))
        self.add("image", self.layer(tar(config__json=b"no", tokenizer=b"[]")), self.layer(tar(**{"model.gguf": b"G"})))
        self.add("evil", self.layer(tar(**{"..__..__evil": b"x"})))
        wrong = self.layer(b"promised", title="config.json")
        self.blobs[wrong["digest"]] = b"replaced"
        self.add("bad", wrong)
        body = self.manifests["artifact"][1]
        entry = {"mediaType": MANIFEST, "digest": digest(body), "size": len(body),
                 "platform": {"os": "linux", "architecture": "amd64"}}  # fmt: skip
        other = {**entry, "digest": digest(b"other"), "platform": {"os": "linux", "architecture": "s390x"}}
        self.manifests[digest(body)] = (MANIFEST, body)
        self.manifests["many"] = (INDEX, json.dumps({"schemaVersion": 2, "manifests": [other, entry]}).encode())

    def layer(self, body: bytes, title: str = "") -> dict:
        self.blobs[digest(body)] = body
        found = {"mediaType": "application/octet-stream", "digest": digest(body), "size": len(body)}
        return found | ({"annotations": {"org.opencontainers.image.title": title}} if title else {})

    def add(self, tag: str, *layers: dict) -> None:
        body = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": list(layers)}).encode()
        self.manifests[tag] = (MANIFEST, body)

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        if path.startswith("/token"):
            given = headers.get("authorization", "").removeprefix("Basic ")
            right = base64.b64decode(given).decode() == self.account
            return (200, {}, b'{"token": "t"}') if right else (401, {}, b"")
        if self.account and headers.get("authorization") != "Bearer t":
            return (
                401,
                {"WWW-Authenticate": f'Bearer realm="{self.url}/token",service="r",scope="repository:m:pull"'},
                b"",
            )
        kind, _, name = path.removeprefix("/v2/m/").partition("/")
        if kind == "manifests" and name in self.manifests:
            media, body = self.manifests[name]
            return 200, {"Content-Type": media}, body
        if kind == "blobs" and name in self.blobs:
            return 200, {}, self.blobs[name]
        return 404, {}, b""


@pytest.fixture
def registry():
    found = Registry()
    with serving(found.answer) as server:
        found.url = server.url
        yield found


def uri(registry: Registry, tag: str) -> str:
    return f"oci://{registry.url.removeprefix('http://')}/m:{tag}"


PLAIN = {"OCI_PLAIN_HTTP": "true"}


@pytest.mark.parametrize("tag", ["artifact", "many"])
def test_the_files_of_an_artifact(fetch, registry: Registry, tmp_path: Path, tag: str) -> None:
    done = fetch(uri(registry, tag), tmp_path / "m", **PLAIN)
    assert done.code == 0, done.log
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "m" / "model.safetensors").stat().st_size == 100_000


def test_the_layers_of_an_image(fetch, registry: Registry, tmp_path: Path) -> None:
    assert fetch(uri(registry, "image"), tmp_path / "m", **PLAIN).code == 0
    assert (tmp_path / "m" / "config" / "json").read_bytes() == b"no"
    assert (tmp_path / "m" / "model.gguf").read_bytes() == b"G"


@pytest.mark.parametrize(
    ("tag", "reason"), [("none", "ModelNotFound"), ("bad", "SourceDamaged"), ("evil", "SourceDamaged")]
)
def test_failures_say_why(fetch, registry: Registry, tmp_path: Path, tag: str, reason: str) -> None:
    done = fetch(uri(registry, tag), tmp_path / "m", **PLAIN)
    assert (done.code, done.reason) == (1, reason), done.log
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "evil").exists()


def test_accounts(fetch, tmp_path: Path) -> None:
    registry = Registry(account="me:secret")
    with serving(registry.answer) as server:
        registry.url = server.url
        refused = fetch(uri(registry, "artifact"), tmp_path / "m", **PLAIN)
        assert (refused.code, refused.reason) == (1, "CredentialsRefused")
        wrong = fetch(uri(registry, "artifact"), tmp_path / "m", **PLAIN, OCI_USERNAME="me", OCI_PASSWORD="x")
        assert (wrong.code, wrong.reason) == (1, "CredentialsRefused")
        host = server.url.removeprefix("http://")
        config = json.dumps({"auths": {host: {"auth": base64.b64encode(b"me:secret").decode()}}})
        assert fetch(uri(registry, "artifact"), tmp_path / "m", **PLAIN, OCI_DOCKER_CONFIG=config).code == 0


def test_docker_configurations() -> None:
    config = json.dumps({"auths": {"https://index.docker.io/v1/": {"username": "u", "password": "p"}}})
    assert credentials("docker.io", {"OCI_DOCKER_CONFIG": config}) == ("u", "p")
    assert credentials("other", {"OCI_DOCKER_CONFIG": config}) is None
    assert credentials("other", {}) is None
