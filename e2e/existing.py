"""Somebody else's cluster instead of the rig: one that a kubeconfig names, or a kind or k3d cluster with Docker.

Nothing of the control plane is built then; kubectl and helm are those on PATH.

    images      on kind and k3d, the Dockerfiles' images are built and loaded; on any other cluster they must be where
                its nodes can pull them, named by MAINSAIL_ENGINE_IMAGE and MAINSAIL_CONTROL_PLANE_IMAGE (NAME:TAG)
    model       into a claim of the cluster's default storage class, through a short-lived Pod
    gateway     by `kubectl port-forward`, on the checkout's port
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e import model, product, venv
from e2e.cluster.place import Place
from e2e.product import Target
from e2e.steps import Progress, StepError, read, run

BUILT_ENGINE, BUILT_CONTROL_PLANE = "mainsail/engine:dev", "mainsail/control-plane:dev"
IMAGE_SETTINGS = ("MAINSAIL_ENGINE_IMAGE", "MAINSAIL_CONTROL_PLANE_IMAGE")
LOADER = "mainsail-model-loader"


@dataclass(frozen=True)
class Existing:
    """A cluster that is there: its kubeconfig, and how images get into it (empty: they are pulled)."""

    origin: str
    kubeconfig: Path
    load: tuple[str, ...] = ()


def find(place: Place, kubeconfig: Path | None) -> Existing | None:
    """The named cluster, else a running kind or k3d one, else None. MAINSAIL_CLUSTER=own says: none."""
    if kubeconfig is not None:
        if not kubeconfig.is_file():
            raise StepError(f"there is no kubeconfig {kubeconfig}", do="name an existing file: make up KUBECONFIG=…")
        return Existing("named", kubeconfig.resolve())
    if os.environ.get("MAINSAIL_CLUSTER") == "own" or not _prints(["docker", "version", "-f", "{{.Server.Version}}"]):
        return None
    return _kind(place) or _k3d(place)


def _kind(place: Place) -> Existing | None:
    for name in _prints(["kind", "get", "clusters"]).split():
        config = _keep(place, _prints(["kind", "get", "kubeconfig", "--name", name]))
        return Existing(f"kind {name}", config, ("kind", "load", "docker-image", "--name", name))
    return None


def _k3d(place: Place) -> Existing | None:
    for cluster in json.loads(_prints(["k3d", "cluster", "list", "-o", "json"]) or "[]"):
        config = _keep(place, _prints(["k3d", "kubeconfig", "get", cluster["name"]]))
        return Existing(f"k3d {cluster['name']}", config, ("k3d", "image", "import", "-c", cluster["name"]))
    return None


def _keep(place: Place, text: str) -> Path:
    place.run.mkdir(parents=True, exist_ok=True)
    path = place.run / "existing-kubeconfig"
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _prints(argv: list[str]) -> str:
    """What a program prints; nothing when it is not there or fails (it is only asked whether it has a cluster)."""
    if shutil.which(argv[0]) is None:
        return ""
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def everything(cluster: Existing, place: Place, progress: Progress) -> Target:
    """The product on that cluster, with the model in a claim and the gateway on the checkout's port."""
    with progress.step("virtual environment"):
        venv.ensure(place)
    with progress.step("model"):
        model.ensure(place)
    with progress.step("images"):
        target = _target(cluster, place, os.environ)
    with progress.step("chart (CRD, operator, gateway)"):
        product.install(target, place.checkout)
    with progress.step("model in a claim"):
        provide_model(target, place)
    with progress.step(f"gateway on port {place.gateway_port}"):
        _forward(target, place)
    return target


def _target(cluster: Existing, place: Place, environ: Mapping[str, str]) -> Target:
    if cluster.load:
        _build_and_load(cluster, place)
        engine, control_plane = BUILT_ENGINE, BUILT_CONTROL_PLANE
    else:
        engine, control_plane = _named_images(environ)
    return Target(kubectl=_on_path("kubectl"), helm=_on_path("helm"), kubeconfig=cluster.kubeconfig, logs=place.logs,
                  engine_image=engine, control_plane_image=control_plane)  # fmt: skip


def _named_images(environ: Mapping[str, str]) -> tuple[str, str]:
    missing = [name for name in IMAGE_SETTINGS if not environ.get(name)]
    if missing:
        raise StepError(f"no images for this cluster: {' and '.join(missing)} not set",
                        do="build engine/Dockerfile and operator/Dockerfile, push them to where the nodes pull from, "
                           f"and name them: {'=NAME:TAG '.join(IMAGE_SETTINGS)}=NAME:TAG",
                        )  # fmt: skip
    return environ[IMAGE_SETTINGS[0]], environ[IMAGE_SETTINGS[1]]


def _build_and_load(cluster: Existing, place: Place) -> None:
    log = place.logs / "images.log"
    for image, file in ((BUILT_ENGINE, "engine/Dockerfile"), (BUILT_CONTROL_PLANE, "operator/Dockerfile")):
        run(["docker", "build", "-t", image, "-f", file, "."], cwd=place.checkout, log=log, do="see the log")
        run([*cluster.load, image], log=log, do="see the log")


def _on_path(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise StepError(f"{name} is not on PATH", do=f"install {name}, or let `make up` build a cluster of its own "
                                                     "(without KUBECONFIG=…, with MAINSAIL_CLUSTER=own)")  # fmt: skip
    return Path(found)


def provide_model(target: Target, place: Place) -> None:
    """Copy the model into the claim `models`, unless the loader has already done so."""
    target.apply(_claim(), _loader(target.control_plane_image))
    target.read("wait", "--for=condition=Ready", f"pod/{LOADER}", "-n", "default", "--timeout=180s")
    source = model.path_of(place)
    copy = (f"import os,shutil,sys; p='/models/{source.name}'; "
            "f=open(p+'.part','wb'); shutil.copyfileobj(sys.stdin.buffer,f); f.close(); os.rename(p+'.part',p)"
            )  # fmt: skip
    with source.open("rb") as file:
        ended = subprocess.run(
            [target.kubectl, "--kubeconfig", target.kubeconfig, "exec", "-i", "-n", "default", LOADER, "--",
             "python", "-c", copy], stdin=file, capture_output=True, text=True, check=False,
        )  # fmt: skip
    target.read("delete", "pod", LOADER, "-n", "default", "--wait=false")
    if ended.returncode:
        raise StepError(f"the model could not be copied into the claim models: {ended.stderr.strip()}",
                        do="see whether the claim is bound and writable: `kubectl get pvc models`")  # fmt: skip


def _claim() -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models", "namespace": "default"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }


def _loader(image: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": LOADER, "namespace": "default"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65534, "fsGroup": 65534,
                                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "loader",
                "image": image,
                "command": ["python", "-c", "import time; time.sleep(600)"],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "models", "mountPath": "/models"}],
            }],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        },
    }  # fmt: skip


def _forward(target: Target, place: Place) -> None:
    """`kubectl port-forward` as a daemon; a former one of this checkout ends first."""
    _end_forward(place)
    with (place.logs / "port-forward.log").open("ab") as out:
        process = subprocess.Popen(
            [target.kubectl, "--kubeconfig", target.kubeconfig, "-n", product.NAMESPACE, "port-forward",
             "service/mainsail-gateway", f"{place.gateway_port}:80"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    record = {"pid": process.pid, "kubectl": str(target.kubectl), "helm": str(target.helm),
              "kubeconfig": str(target.kubeconfig)}  # fmt: skip
    (place.run / "existing.json").write_text(json.dumps(record))


def _end_forward(place: Place) -> None:
    path = place.run / "existing.json"
    if not path.exists():
        return
    pid = json.loads(path.read_text())["pid"]
    with contextlib.suppress(OSError):
        if b"port-forward" in Path(f"/proc/{pid}/cmdline").read_bytes():  # and not another process of that number
            os.kill(pid, signal.SIGTERM)


def leave(place: Place) -> None:
    """Take the product off the cluster that `make up` found; the cluster itself is not ours to end."""
    path = place.run / "existing.json"
    if not path.exists():
        return
    record = json.loads(path.read_text())
    do = "remove what is left by hand: InferenceService smollm2, claim models, release mainsail"
    access = ["--kubeconfig", record["kubeconfig"]]
    delete = [record["kubectl"], *access, "delete", "--ignore-not-found"]
    read([*delete, "-f", str(product.EXAMPLE), "--timeout=120s"], do=do)
    read([*delete, "pvc/models", "-n", "default", "--wait=false"], do=do)
    read([record["helm"], *access, "uninstall", "mainsail", "-n", product.NAMESPACE, "--ignore-not-found"], do=do)
    _end_forward(place)
    path.unlink()
