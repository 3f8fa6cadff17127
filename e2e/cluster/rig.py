"""The cluster of a checkout: up, down, status.

`up` uses a cluster that runs and is whole; what is left of another one it takes down first. `down` ends whatever
lives in the checkout's cgroup, then removes the network namespace and the running state: it needs no record of
what was started, so it also works after a kill. Logs stay.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import cgroups, gobuild, images, netns, packages
from e2e.cluster.configuration import Configuration
from e2e.cluster.gobuild import Programs
from e2e.cluster.packages import Packages
from e2e.cluster.pki import Pki
from e2e.cluster.place import Place
from e2e.steps import StepError, read, run, wait_until

START_S = 150
RESTRICTED_NAMESPACES = ("default", "mainsail-system")
COMPONENTS = ("etcd", "kube-apiserver", "containerd", "kube-controller-manager", "kube-scheduler", "kubelet",
              "coredns", "kube-proxy")  # fmt: skip
PORT_SETTINGS = {"MAINSAIL_PORT": "the gateway", "MAINSAIL_API_PORT": "the API server"}


@dataclass(frozen=True)
class Status:
    """What runs: `up` says that process 1 brought everything up, `ended` which components ended since."""

    running: bool
    up: bool
    ended: tuple[str, ...]
    failed: str
    reachable: bool

    @property
    def whole(self) -> bool:
        """Whether it can be used as it is."""
        return self.running and self.up and not self.ended and self.reachable


def status(place: Place) -> Status:
    """The state of this checkout's cluster."""
    running = bool(cgroups.processes(cgroups.groups_named(place.name)))
    events = _events(place)
    return Status(
        running=running,
        up=any(event["event"] == "up" for event in events),
        ended=_ended(events),
        failed=next((str(event["what"]) for event in events if event["event"] == "failed"), ""),
        reachable=running and _answers(place),
    )


def _ended(events: list[dict[str, object]]) -> tuple[str, ...]:
    """Components that ended and were not started again."""
    last = {str(event["name"]): event["event"] for event in events if event["event"] in ("started", "ended")}
    return tuple(name for name, event in last.items() if event == "ended")


def revive(place: Place) -> None:
    """Start again the components that have ended."""
    for pid in cgroups.processes(cgroups.groups_named(place.name)):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "e2e.cluster.machine" in words and "run" in words and not _is_unshare(words):
                os.kill(pid, signal.SIGUSR1)


def _is_unshare(words: list[str]) -> bool:
    """The parent of process 1 has the same words on its command line."""
    return words[0].endswith("unshare")


def up(place: Place) -> bool:
    """Bring the cluster up; False when it was up and whole before."""
    if status(place).whole:
        return False
    down(place)
    check_ports(place)
    check_venv(place)
    unpacked, programs = packages.ensure(place), gobuild.ensure(place)
    _fresh_folders(place)
    link_programs(place, programs)
    configuration = _configure(place, unpacked, programs)
    pki = Pki(configuration.pki, unpacked, place.logs / "pki.log")
    pki.make()
    pki.write_kubeconfig(place.kubeconfig, "admin", f"https://127.0.0.1:{place.api_port}")
    netns.make(place.name, unpacked, place.logs / "netns.log")
    _start(place, "machine", "launch", place.name, str(place.state / "configuration.json"))
    wait_until(
        "the cluster is up",
        lambda: _is_up(place),
        seconds=START_S,
        log=place.logs / "machine.log",
        do=f"see the components' logs in {place.logs}, then run it again",
    )
    _start(place, "forward", place.name, str(place.api_port), str(place.gateway_port))
    wait_until(
        f"the API server answers on port {place.api_port}",
        lambda: _answers(place),
        seconds=120,
        log=place.logs / "forward.log",
        do="run it again",
    )
    _namespaces(place)
    return True


def down(place: Place) -> int:
    """End everything; the number of processes that there were."""
    killed = cgroups.end(place.name)
    netns.remove(place.name)
    shutil.rmtree(place.state, ignore_errors=True)
    for path in (place.kubeconfig, place.environment):
        path.unlink(missing_ok=True)
    return killed


def check_ports(place: Place) -> None:
    """Whether the host's two ports are free."""
    for port, setting in ((place.gateway_port, "MAINSAIL_PORT"), (place.api_port, "MAINSAIL_API_PORT")):
        try:
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise StepError(f"port {port} of 127.0.0.1 is taken (it is to lead to {PORT_SETTINGS[setting]})",
                            do=f"end what listens there (`ss -ltnp 'sport = :{port}'`) or choose another port: "
                               f"{setting}=…") from error  # fmt: skip


def check_venv(place: Place) -> None:
    """Whether there is a virtual environment for the containers to see."""
    if not os.access(place.venv / "bin/python", os.X_OK):
        raise StepError(f"there is no virtual environment in {place.venv}", do="make it: `make venv`")


def kubectl(place: Place, *argv: str, stdin: str | None = None) -> str:
    """kubectl as the cluster's admin; its output."""
    return read(
        [place.programs / "kubectl", "--kubeconfig", place.kubeconfig, *argv],
        stdin=stdin,
        do="see what the API server says in the message",
    )


def link_programs(place: Place, programs: Programs) -> None:
    """kubectl and helm under their own names."""
    place.programs.mkdir(parents=True, exist_ok=True)
    for name in ("kubectl", "helm", "kubeall"):
        link = place.programs / name
        link.unlink(missing_ok=True)
        link.symlink_to(programs.kubeall)


def _configure(place: Place, unpacked: Packages, programs: Programs) -> Configuration:
    prefix = read(
        [place.venv / "bin/python", "-c", "import sys; print(sys.base_prefix)"],
        do="make the virtual environment again: `make venv`",
    ).strip()
    configuration = Configuration(
        state=place.state,
        logs=place.logs,
        kubeall=programs.kubeall,
        packages=unpacked.root,
        bound=images.seen_by_containers(place.venv, place.sources, prefix),
        images=tuple(map(str, _write_images(place, programs))),
        cgroup_root=f"/{place.name}" if cgroups.is_v2() else "",
    )
    configuration.write(place.state / "configuration.json")
    return configuration


def _write_images(place: Place, programs: Programs) -> list[Path]:
    folder = place.state / "images"
    folder.mkdir()
    scripts = tomllib.loads((place.checkout / "pyproject.toml").read_text())["project"]["scripts"]
    paths: list[Path] = []
    for image in images.node_images(programs.pause.read_bytes(), scripts, place.sources):
        path = folder / f"{image.name.rpartition('/')[2].partition(':')[0]}.tar"
        path.write_bytes(images.archive(image))
        paths.append(path)
    return paths


def _fresh_folders(place: Place) -> None:
    shutil.rmtree(place.logs / "pods", ignore_errors=True)
    for name in (*COMPONENTS, "machine", "forward", "pki", "netns"):
        (place.logs / f"{name}.log").unlink(missing_ok=True)
    for folder in (place.state, place.state / "etcd", place.logs):
        folder.mkdir(parents=True, exist_ok=True)
    (place.state / "etcd").chmod(0o700)


def _start(place: Place, module: str, *argv: str) -> None:
    """Start a module of this package as a daemon of its own session."""
    with (place.logs / f"{module}.log").open("ab") as out:
        subprocess.Popen(
            [sys.executable, "-m", f"e2e.cluster.{module}", *argv], cwd=place.checkout, stdin=subprocess.DEVNULL,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def _events(place: Place) -> list[dict[str, object]]:
    path = place.state / "status.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _is_up(place: Place) -> bool:
    events = _events(place)
    for event in events:
        if event["event"] == "failed":
            component = next((name for name in COMPONENTS if name in str(event["what"])), "machine")
            raise StepError(f"the cluster did not come up: {event['what']}", log=place.logs / f"{component}.log",
                            do=f"see that log and the others in {place.logs}, then run it again")  # fmt: skip
    return any(event["event"] == "up" for event in events)


def _answers(place: Place) -> bool:
    if not (place.kubeconfig.exists() and (place.programs / "kubectl").exists()):
        return False
    try:
        return kubectl(place, "get", "--raw=/readyz", "--request-timeout=3s") == "ok"
    except StepError:
        return False


def _namespaces(place: Place) -> None:
    """The namespaces, which refuse every Pod that the "restricted" standard refuses."""
    manifests = [
        {"apiVersion": "v1", "kind": "Namespace",
         "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
        for name in RESTRICTED_NAMESPACES
    ]  # fmt: skip
    items = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    run([place.programs / "kubectl", "--kubeconfig", place.kubeconfig, "apply", "--server-side", "-f", "-"],
        stdin=items, log=place.logs / "namespaces.log", do="run it again")  # fmt: skip
