"""Keys, certificates and kubeconfigs of one cluster, made anew for each (EC P-256, by openssl)."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.network import API_URL, NODE, NODE_IP, SERVICE_API_IP
from e2e.cluster.packages import Packages
from e2e.steps import run

DAYS = "3650"
DO = "see the log; is the machine's openssl whole?"
API_NAMES = (
    *(f"DNS:kubernetes{rest}" for rest in ("", ".default", ".default.svc", ".default.svc.cluster.local")),
    "DNS:localhost",
    "IP:127.0.0.1",
    f"IP:{SERVICE_API_IP}",
    f"IP:{NODE_IP}",
)


@dataclass(frozen=True)
class Leaf:
    """One certificate: its file name, subject, issuer and names."""

    name: str
    subject: str
    issuer: str = "ca"
    names: tuple[str, ...] = ()


AUTHORITIES = {"ca": "mainsail-ca", "front-proxy-ca": "front-proxy-ca"}
LEAVES = (
    Leaf("apiserver", "/CN=kube-apiserver", names=API_NAMES),
    Leaf("apiserver-kubelet", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
    Leaf("front-proxy-client", "/CN=front-proxy-client", issuer="front-proxy-ca"),
    Leaf("admin", "/O=system:masters/CN=admin"),
    Leaf("controller-manager", "/CN=system:kube-controller-manager"),
    Leaf("scheduler", "/CN=system:kube-scheduler"),
    Leaf("proxy", "/CN=system:kube-proxy"),
    Leaf("kubelet", f"/O=system:nodes/CN=system:node:{NODE}", names=(f"DNS:{NODE}", f"IP:{NODE_IP}")),
)
USERS = ("admin", "controller-manager", "scheduler", "proxy", "kubelet")


class Pki:
    """A folder of keys and certificates."""

    def __init__(self, folder: Path, packages: Packages, log: Path) -> None:
        self.folder = folder
        self._openssl = packages.program("openssl")
        self._environment = packages.environment()
        self._log = log

    def make(self) -> None:
        """Everything: authorities, leaves, the key of service accounts, a kubeconfig per user."""
        self.folder.mkdir(parents=True, mode=0o700)
        for name, common_name in AUTHORITIES.items():
            self._authority(name, common_name)
        for leaf in LEAVES:
            self._leaf(leaf)
        self._key("sa")
        self._run("pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
        for user in USERS:
            self.write_kubeconfig(self.folder / f"{user}.conf", user, API_URL)

    def write_kubeconfig(self, path: Path, user: str, server: str) -> None:
        """A kubeconfig with everything inside (JSON is YAML), readable by its owner only."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [_named("cluster", {"server": server, "certificate-authority-data": self._data("ca.crt")})],
            "users": [_named("user", {"client-certificate-data": self._data(f"{user}.crt"),
                                      "client-key-data": self._data(f"{user}.key")})],
            "contexts": [_named("context", {"cluster": "mainsail", "user": "mainsail"})],
            "current-context": "mainsail",
        }  # fmt: skip
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1) + "\n")

    def _run(self, *argv: str) -> None:
        run([self._openssl, *argv], log=self._log, cwd=self.folder, env=self._environment, do=DO)

    def _data(self, name: str) -> str:
        return base64.b64encode((self.folder / name).read_bytes()).decode()

    def _key(self, name: str) -> None:
        self._run("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")
        (self.folder / f"{name}.key").chmod(0o600)

    def _authority(self, name: str, common_name: str) -> None:
        self._key(name)
        self._run("req", "-x509", "-new", "-sha256", "-key", f"{name}.key", "-days", DAYS, "-out", f"{name}.crt",
                  "-subj", f"/CN={common_name}", "-addext", "basicConstraints=critical,CA:true",
                  "-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature")  # fmt: skip

    def _leaf(self, leaf: Leaf) -> None:
        self._key(leaf.name)
        extensions = self.folder / f"{leaf.name}.ext"
        extensions.write_text(leaf_extensions(leaf))
        self._run("req", "-new", "-key", f"{leaf.name}.key", "-subj", leaf.subject, "-out", f"{leaf.name}.csr")
        self._run("x509", "-req", "-sha256", "-days", DAYS, "-in", f"{leaf.name}.csr", "-CA", f"{leaf.issuer}.crt",
                  "-CAkey", f"{leaf.issuer}.key", "-CAcreateserial", "-extfile", str(extensions),
                  "-out", f"{leaf.name}.crt")  # fmt: skip


def leaf_extensions(leaf: Leaf) -> str:
    """The openssl extension file of a leaf."""
    lines = ["basicConstraints=CA:false", "keyUsage=critical,digitalSignature",
             "extendedKeyUsage=serverAuth,clientAuth"]  # fmt: skip
    if leaf.names:
        lines.append(f"subjectAltName={','.join(leaf.names)}")
    return "\n".join(lines) + "\n"


def _named(kind: str, value: object) -> dict[str, object]:
    return {"name": "mainsail", kind: value}
