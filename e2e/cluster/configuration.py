"""What process 1 of the cluster is told (one JSON file), and the components' configuration files filled from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from e2e.cluster.network import NODE_IP, POD_RANGE, ROUTER_IP
from e2e.steps import StepError

TEMPLATES = Path(__file__).parent / "etc"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
PAUSE_IMAGE = "localhost/mainsail-pause:dev"


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Everything that process 1 must know; `bound` are the host's folders and where containers see them."""

    state: Path
    logs: Path
    kubeall: Path
    packages: Path
    bound: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    cgroup_root: str

    @property
    def pki(self) -> Path:
        """The folder of keys and certificates."""
        return self.state / "pki"

    @property
    def status(self) -> Path:
        """One JSON line per event of process 1."""
        return self.state / "status.jsonl"

    def write(self, path: Path) -> None:
        """For `read`, in the other process."""
        path.write_text(json.dumps(asdict(self), default=str, indent=1))

    @classmethod
    def read(cls, path: Path) -> Configuration:
        """What `write` wrote."""
        fields = json.loads(path.read_text())
        folders = {name: Path(fields.pop(name)) for name in ("state", "logs", "kubeall", "packages")}
        bound = tuple((here, there) for here, there in fields.pop("bound"))
        return cls(**folders, bound=bound, images=tuple(fields.pop("images")), **fields)

    def fill(self, name: str) -> Path:
        """Write the configuration file `name` for this cluster; its path."""
        path = self.state / "etc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled((TEMPLATES / name).read_text(), self._values()))
        return path

    def _values(self) -> dict[str, str]:
        return {
            "CGROUP_ROOT": self.cgroup_root,
            "CNI_PROGRAMS": str(self.packages / "usr/lib/cni"),
            "CONTAINERD_SOCKET": CONTAINERD_SOCKET,
            "LOGS": str(self.logs),
            "NODE_IP": NODE_IP,
            "PAUSE_IMAGE": PAUSE_IMAGE,
            "PKI": str(self.pki),
            "POD_RANGE": POD_RANGE,
            "ROUTER_IP": ROUTER_IP,
            "STATE": str(self.state),
        }


def filled(template: str, values: dict[str, str]) -> str:
    """The template with every @NAME@ replaced; a name without a value is an error."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise StepError(f"a configuration template names @{found[1]}@, which has no value",
                            do=f"give it one in {__name__}")  # fmt: skip
        return values[found[1]]

    return re.sub(r"@([A-Z_]+)@", value, template)
