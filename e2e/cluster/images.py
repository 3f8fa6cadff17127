"""The node's container images: a few links and an account file each, because the runtime binds the host's files.

Every container sees, read-only, the host's /usr and interpreter in their places, and the checkout's virtual environment
and source folders below /opt/mainsail, wherever the checkout lies (containerd's base spec): a checkout below /tmp would
else vanish under a Pod's own /tmp. The environment's scripts and links name the checkout's path, so the images bring
scripts of their own, and PYTHONPATH. So an image is ready the moment the sources are, a Pod needs no volume for it, and
what runs in the Pod is exactly what the unit tests ran. Real images are built by the Dockerfiles of operator/ and
engine/; the Pods that the chart and the operator make are the same for both.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.cluster.configuration import PAUSE_IMAGE

HOME = Path("/opt/mainsail")
ENGINE_IMAGE = "localhost/mainsail-engine:dev"
CONTROL_PLANE_IMAGE = "localhost/mainsail-control-plane:dev"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
LINKS = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}
ACCOUNTS = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/usr/sbin/nologin\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": b"hosts: files dns\n",
}
FOLDERS = ("usr", "tmp", "var/tmp", "models")


@dataclass(frozen=True, kw_only=True)
class Image:
    """A one-layer image: name with tag, and what it holds."""

    name: str
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    folders: Sequence[str] = ()
    entrypoint: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    user: str = ""


def seen_by_containers(venv: Path, sources: Iterable[Path], interpreter_prefix: str) -> tuple[tuple[str, str], ...]:
    """Pairs of a host's folder and the path that containers see it at."""
    system = ["/usr", "/etc/ld.so.cache"]
    if not Path(interpreter_prefix).is_relative_to("/usr"):
        system.append(interpreter_prefix)
    moved = [(str(venv), str(HOME / "venv")), *((str(source), str(HOME / source.name)) for source in sources)]
    return (*((path, path) for path in system), *moved)


def script(entry_point: str) -> bytes:
    """A console script for an entry point of pyproject.toml ("package.module:function")."""
    module, _, function = entry_point.partition(":")
    return f"#!{HOME}/venv/bin/python\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n".encode()


def node_images(pause: bytes, scripts: Mapping[str, str], sources: Iterable[Path]) -> list[Image]:
    """All images of the node; `scripts` are the entry points by name."""
    environment = {"PATH": f"{HOME}/bin:{HOME}/venv/bin:/usr/local/bin:/usr/bin:/bin",
                   "PYTHONPATH": ":".join(str(HOME / source.name) for source in sources),
                   "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTHONUNBUFFERED": "1"}  # fmt: skip
    files = {**ACCOUNTS, **{f"opt/mainsail/bin/{name}": script(entry) for name, entry in scripts.items()}}
    host = [Image(name=name, files=files, links=LINKS, folders=FOLDERS, environment=environment, user="65534:65534")
            for name in (ENGINE_IMAGE, CONTROL_PLANE_IMAGE)]  # fmt: skip
    return [Image(name=PAUSE_IMAGE, files={"pause": pause}, entrypoint=["/pause"]), *host]


def archive(image: Image) -> bytes:
    """The image as an OCI archive that `ctr images import` takes; the same input gives the same bytes."""
    layer = _layer(image)
    config = _json({
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "config": {
            "Env": [f"{name}={value}" for name, value in image.environment.items()],
            "Entrypoint": list(image.entrypoint),
            "User": image.user,
        },
    })  # fmt: skip
    manifest = _json({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
    })  # fmt: skip
    names = {"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": image.name.rpartition(":")[2]}
    entry = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest) | {"annotations": names}
    blobs = {f"blobs/sha256/{_digest(blob)[7:]}": blob for blob in (config, manifest, layer)}
    return _tar([
        ("oci-layout", _json({"imageLayoutVersion": "1.0.0"})),
        ("index.json", _json({"schemaVersion": 2, "manifests": [entry]})),
        *blobs.items(),
    ])  # fmt: skip


def base_spec(default: dict[str, Any], bound: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """containerd's default container spec, with the host's folders bound and no limits of its own on open files."""
    process = {key: value for key, value in default["process"].items() if key != "rlimits"}
    binds = [{"destination": there, "source": here, "type": "bind", "options": ["rbind", "ro", "rprivate"]}
             for here, there in bound]  # fmt: skip
    return default | {"process": process, "mounts": [*default["mounts"], *binds]}


def _layer(image: Image) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for name in _folders_of(image):
            layer.addfile(_member(name, tarfile.DIRTYPE, 0o1777 if name.endswith("tmp") else 0o755))
        for name, target in image.links.items():
            member = _member(name, tarfile.SYMTYPE, 0o777)
            member.linkname = target
            layer.addfile(member)
        for name, data in image.files.items():
            member = _member(name, tarfile.REGTYPE, 0o644 if name.startswith("etc/") else 0o755)
            member.size = len(data)
            layer.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _folders_of(image: Image) -> list[str]:
    """The image's folders and all that lie above something, outer ones first."""
    wanted = {*image.folders, *(str(Path(name).parent) for name in (*image.files, *image.links))}
    above = {str(parent) for name in wanted for parent in Path(name).parents}
    return sorted((wanted | above) - {"."})


def _member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode = kind, mode
    return member


def _tar(files: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
