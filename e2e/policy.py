"""An engine for NetworkPolicies on the rig, whose own plugin enforces none: SIG Network's kube-network-policies.

Built from its Go module. It decides about each new connection in user space, for packets that netfilter queues. It
installs the rule that queues them by itself where the kernel has nftables' `queue` statement; the rule here does the
same by the older NFQUEUE target, which more kernels have.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.cluster import cache, gobuild, netns, packages
from e2e.cluster.network import API_PORT, NODE, NODE_IP, POD_RANGE
from e2e.cluster.place import Place
from e2e.kube import Kube, Object
from e2e.steps import run

MODULE = "sigs.k8s.io/kube-network-policies/cmd@v0.8.0"
QUEUE = "100"
NAME = "policy-engine"
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def ensure(place: Place) -> Path:
    """The program; builds it when the cache has none."""
    log = place.logs / "policy-build.log"

    def build(draft: Path) -> None:
        run(["go", "install", *gobuild.TRIMMED, MODULE], log=log, do="see the log",
            env=gobuild.build_environment(os.environ) | {"GOBIN": str(draft)})  # fmt: skip

    return cache.entry(place.cache, f"policy-{cache.key_of(MODULE)}", build) / "cmd"


@contextmanager
def enforced(place: Place, kube: Kube) -> Iterator[None]:
    """NetworkPolicies hold, for connections that begin in the block."""
    program, unpacked = ensure(place), packages.ensure(place)
    kube.apply(*_account())
    token = kube.run("create", "token", NAME, "-n", "kube-system")
    inside = ["nsenter", f"--net={netns.path_of(place.name)}"]
    tables = [*inside, str(unpacked.root / "usr/sbin/xtables-nft-multi"), "iptables"]
    rule = ["FORWARD", "-d", POD_RANGE, "-m", "conntrack", "--ctstate", "NEW", "-j", "NFQUEUE", "--queue-num", QUEUE]
    library = Path(unpacked.environment()["LD_LIBRARY_PATH"])
    environment = {**os.environ, **unpacked.environment(), "XTABLES_LIBDIR": str(library / "xtables"),
                   "KUBERNETES_SERVICE_HOST": NODE_IP, "KUBERNETES_SERVICE_PORT": str(API_PORT)}  # fmt: skip
    with tempfile.TemporaryDirectory() as name, (place.logs / "policy.log").open("wb") as out:
        Path(name, "token").write_text(token)
        Path(name, "ca.crt").write_bytes((place.state / "pki/ca.crt").read_bytes())
        script = f"mkdir -p {_ACCOUNT} && mount --bind {name} {_ACCOUNT} && exec {program} --nfqueue-id={QUEUE} " \
                 f"--hostname-override={NODE} --disable-nri --netfilter-bug-1766-fix=false"  # fmt: skip
        private = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs /var/run && {script}"]
        process = subprocess.Popen([*inside, *private], env=environment, stdout=out, stderr=out)
        subprocess.run([*tables, "-I", *rule], env=environment, check=True)
        try:
            yield
        finally:
            subprocess.run([*tables, "-D", *rule], env=environment, check=True)
            process.send_signal(signal.SIGKILL)
            process.wait(10)


def _account() -> list[Object]:
    """Who may read what decides."""
    group, meta = "rbac.authorization.k8s.io", {"name": NAME}
    read = {"verbs": ["list", "watch"]}
    rules = [{"apiGroups": [""], "resources": ["pods", "namespaces", "nodes"], **read},
             {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], **read}]  # fmt: skip
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {**meta, "namespace": "kube-system"}},
        {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": meta, "rules": rules},
        {"apiVersion": f"{group}/v1", "kind": "ClusterRoleBinding", "metadata": meta,
         "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": NAME},
         "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": "kube-system"}]},
    ]  # fmt: skip
