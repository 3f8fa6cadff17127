"""Process 1 of the cluster: mounts, addresses, then every component as a plain process, each awaited.

    python -m e2e.cluster.machine launch NAME CONFIGURATION     enters cgroup and namespaces, then becomes:
    python -m e2e.cluster.machine run CONFIGURATION             process 1 of the PID namespace

Being process 1 of its own PID namespace makes the end exact: when it dies, the kernel kills every process of the
cluster, containers too, and with the mount namespace go all mounts. It writes one JSON line per event to the status
file and restarts nothing by itself: a component that ended is reported, not hidden. SIGUSR1 starts again what has
ended, for tests that kill a component.

    /run         a private tmpfs                   (containerd's socket, the shims)
    /var         an overlay over the host's        (paths that the kubelet hard-codes never touch the host), but
                 /var/lib/kubelet is the cluster's own folder: the paths of the kubelet's sockets may not be long
    /sys         fresh: this network namespace's devices, with the cgroup hierarchies mounted again below it
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from e2e.cluster import cgroups, components, images, netns
from e2e.cluster.configuration import CONTAINERD_SOCKET, Configuration
from e2e.cluster.network import API_URL, NODE, NODE_IP, NODE_PREFIX, ROUTER_IP
from e2e.cluster.packages import Packages

WAIT_S = 120
NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def launch(name: str, configuration: Path) -> NoReturn:
    """Enter the cluster's cgroup and namespaces and become process 1 in there."""
    cgroups.enter(name)
    scope = () if cgroups.is_v2() else ("--cgroup",)
    os.execvp("nsenter", [
        "nsenter", f"--net={netns.path_of(name)}", "unshare", *NAMESPACES, *scope,
        sys.executable, "-m", "e2e.cluster.machine", "run", str(configuration),
    ])  # fmt: skip


class NotInTimeError(Exception):
    """A component did not become what was awaited."""


class Machine:
    """The components and their story."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self._packages = Packages(configuration.packages)
        self._began = time.monotonic()
        self._status = configuration.status.open("a", buffering=1)
        self._names: dict[int, str] = {}
        self._commands: dict[str, Sequence[str]] = {}
        self._to_revive = False
        signal.signal(signal.SIGUSR1, self._asked_to_revive)

    def _asked_to_revive(self, _number: int, _frame: object) -> None:
        self._to_revive = True

    def note(self, event: str, **more: object) -> None:
        """One line of the status file."""
        line = {"seconds": round(time.monotonic() - self._began, 2), "event": event, **more}
        self._status.write(json.dumps(line) + "\n")

    def start(self, name: str, argv: Sequence[str]) -> None:
        """Start a component with its own log."""
        out = (self.configuration.logs / f"{name}.log").open("ab")
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            cwd=self.configuration.state, env={**os.environ, **self._packages.environment()},
        )  # fmt: skip
        self._names[process.pid] = name
        self._commands[name] = argv
        self.note("started", name=name, pid=process.pid)

    def until(self, name: str, what: str, holds: Callable[[], bool]) -> None:
        """Wait for a component; when it ends, or takes too long, say so and give up."""
        end = time.monotonic() + WAIT_S
        while not _holds(holds):
            if name in self._reaped():
                raise NotInTimeError(f"{name} ended")
            if time.monotonic() > end:
                raise NotInTimeError(f"{name}: not {what} after {WAIT_S} s")
            time.sleep(0.05)
        self.note("reached", name=name, what=what)

    def reap(self) -> NoReturn:
        """Collect ended processes for ever; process 1 inherits every orphan."""
        while True:
            if not self._reaped():
                time.sleep(0.2)
            if self._to_revive:
                self._to_revive = False
                for name in self._commands.keys() - set(self._names.values()):
                    self.start(name, self._commands[name])

    def _reaped(self) -> list[str]:
        ended: list[str] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            if name := self._names.pop(pid, None):
                ended.append(name)
                self.note("ended", name=name, code=os.waitstatus_to_exitcode(status))


def bring_up(machine: Machine) -> None:
    """The components in the order in which they need each other."""
    it = machine.configuration
    _mount(it)
    _addresses(machine)
    _write_base_spec(it)
    it.fill("cni/10-mainsail.conflist")
    machine.start("etcd", components.etcd(it))
    machine.start("kube-apiserver", components.api_server(it))
    machine.start("containerd", components.containerd(it))
    machine.until("containerd", "listening", _containerd_listens)
    _import_images(it)
    machine.note("reached", name="images", what="imported")
    machine.until("kube-apiserver", "ready", lambda: _get(f"{API_URL}/readyz")[0] == 200)
    machine.start("kube-controller-manager", components.controller_manager(it))
    machine.start("kube-scheduler", components.scheduler(it))
    machine.start("kubelet", components.kubelet(it))
    machine.start("coredns", components.coredns(it))
    machine.start("kube-proxy", components.kube_proxy(it))
    machine.until("kube-scheduler", "healthy", lambda: _healthy("https://127.0.0.1:10259/healthz"))
    machine.until("kube-controller-manager", "healthy", lambda: _healthy("https://127.0.0.1:10257/healthz"))
    machine.until("kubelet", "a Ready node", lambda: _node_ready(it))
    machine.until("coredns", "ready", lambda: _healthy("http://127.0.0.1:8181/ready"))
    machine.until("kube-proxy", "healthy", lambda: _healthy("http://127.0.0.1:10256/healthz"))


def _mount(it: Configuration) -> None:
    hierarchies = cgroups.current()
    _run("mount", "-t", "sysfs", "sysfs", "/sys")  # hides /sys/fs/cgroup: mounted again, seen from the namespace
    if hierarchies[0].version == 2:
        _run("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    else:
        _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/sys/fs/cgroup")
        for hierarchy in hierarchies:
            folder = cgroups.ROOT / hierarchy.mount.name
            folder.mkdir()
            _run("mount", "-t", "cgroup", "-o", cgroups.mount_options(hierarchy), "cgroup", str(folder))
    _run("mount", "-t", "tmpfs", "tmpfs", "/run")
    upper, work = it.state / "var/upper", it.state / "var/work"
    upper.mkdir(parents=True)
    work.mkdir()
    _run("mount", "-t", "overlay", "-o", f"lowerdir=/var,upperdir={upper},workdir={work}", "overlay", "/var")
    own = it.state / "kubelet"
    own.mkdir()
    components.KUBELET_ROOT.mkdir(parents=True, exist_ok=True)
    _run("mount", "--bind", str(own), str(components.KUBELET_ROOT))
    _run("mount", "--make-rshared", "/")


def _addresses(machine: Machine) -> None:
    # A veth pair with both ends in here carries the node's address (not every kernel has the dummy driver). The
    # default route leads to nobody, but without one a ClusterIP never reaches the rule that translates it.
    packages = Packages(machine.configuration.packages)
    for words in (
        "link set lo up",
        "link add eth0 type veth peer name eth0-peer",
        "link set eth0 up",
        "link set eth0-peer up",
        f"addr add {NODE_IP}/{NODE_PREFIX} dev eth0",
        f"route add default via {ROUTER_IP} dev eth0",
        f"neigh add {ROUTER_IP} lladdr 02:00:00:00:00:fe dev eth0 nud permanent",
    ):
        _run(str(packages.program("ip")), *words.split(), env=packages.environment())
    for setting, value in (("ipv4/ip_forward", "1"), ("ipv4/conf/all/rp_filter", "0"),
                           ("bridge/bridge-nf-call-iptables", "1")):  # fmt: skip
        path = Path("/proc/sys/net") / setting
        if path.exists():
            path.write_text(value)
        else:
            machine.note("missing", name=str(path))


def _write_base_spec(it: Configuration) -> None:
    packages = Packages(it.packages)
    command = [str(packages.program("ctr")), "oci", "spec"]
    default = subprocess.run(command, check=True, capture_output=True, env=packages.environment()).stdout
    spec = images.base_spec(json.loads(default), it.bound)
    (it.state / "etc").mkdir(exist_ok=True)
    (it.state / "etc/base-spec.json").write_text(json.dumps(spec, indent=1))


def _import_images(it: Configuration) -> None:
    packages = Packages(it.packages)
    ctr = str(packages.program("ctr"))
    for archive in it.images:
        _run(ctr, "-a", CONTAINERD_SOCKET, "-n", "k8s.io", "images", "import", archive, env=packages.environment())


def _run(*argv: str, env: dict[str, str] | None = None) -> None:
    print("$", *argv, flush=True)
    subprocess.run(argv, check=True, env={**os.environ, **(env or {})})


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (OSError, http.client.HTTPException):
        return False


def _containerd_listens() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(CONTAINERD_SOCKET)
    return True


def _healthy(url: str) -> bool:
    return _get(url)[0] == 200


def _node_ready(it: Configuration) -> bool:
    status, body = _get(f"{API_URL}/api/v1/nodes/{NODE}", client=it.pki / "admin")
    if status != 200:
        return False
    conditions = json.loads(body)["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _get(url: str, client: Path | None = None) -> tuple[int, bytes]:
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # self-signed, and all on this machine
        if client is not None:
            context.load_cert_chain(f"{client}.crt", f"{client}.key")
        connection = http.client.HTTPSConnection(host, timeout=2, context=context)
    else:
        connection = http.client.HTTPConnection(host, timeout=2)
    try:
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _exit_at_once(_number: int, _frame: object) -> NoReturn:
    os._exit(0)  # and with it every other process of the namespace


def run(configuration: Configuration) -> NoReturn:
    """Be process 1."""
    signal.signal(signal.SIGTERM, _exit_at_once)
    machine = Machine(configuration)
    try:
        bring_up(machine)
    except (NotInTimeError, OSError, subprocess.CalledProcessError) as error:
        machine.note("failed", what=str(error))
        raise SystemExit(1) from error
    machine.note("up")
    machine.reap()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["launch", name, path]:
            launch(name, Path(path))
        case ["run", path]:
            run(Configuration.read(Path(path)))
        case _:
            raise SystemExit("usage: python -m e2e.cluster.machine launch NAME CONFIGURATION | run CONFIGURATION")
