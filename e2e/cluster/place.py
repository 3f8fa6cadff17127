"""Where everything of one checkout lies, and the names and ports that follow from its path.

Two checkouts on one machine differ in all of these, and share only the cache, whose entries are keyed by content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e.steps import StepError

FIRST_PORT = 20000  # below the kernel's range for outgoing connections (32768 and up)
PORT_PAIRS = 5000


@dataclass(frozen=True, kw_only=True)
class Place:
    """One checkout's folders, names and ports."""

    checkout: Path
    cache: Path
    gateway_port: int
    api_port: int

    @property
    def name(self) -> str:
        """Name of the network namespace and of the cgroup."""
        return f"mainsail-{identity(self.checkout)[:8]}"

    @property
    def run(self) -> Path:
        """What a user reads: kubeconfig, env, logs, programs."""
        return self.checkout / ".run"

    @property
    def state(self) -> Path:
        """The running cluster's own files, made anew by every `up`."""
        return self.run / "cluster"

    @property
    def logs(self) -> Path:
        """One log per step, and below it one per component."""
        return self.run / "log"

    @property
    def programs(self) -> Path:
        """kubectl and helm under their own names, for PATH."""
        return self.run / "bin"

    @property
    def kubeconfig(self) -> Path:
        """Admin of the cluster, from the host."""
        return self.run / "kubeconfig"

    @property
    def environment(self) -> Path:
        """Shell file to be sourced."""
        return self.run / "env"

    @property
    def venv(self) -> Path:
        """The checkout's virtual environment."""
        return self.checkout / ".venv"

    @property
    def sources(self) -> tuple[Path, ...]:
        """The folders that hold packages: what an editable install points at."""
        return tuple(self.checkout / folder for folder in ("operator", "engine", "kernels"))

    @property
    def models(self) -> Path:
        """Model files, shared by all checkouts."""
        return self.cache / "models"

    @property
    def gateway_url(self) -> str:
        """The gateway from the host."""
        return f"http://127.0.0.1:{self.gateway_port}"


def identity(checkout: Path) -> str:
    """A checkout's stable identity: the hash of its path."""
    return hashlib.sha256(os.fsencode(checkout)).hexdigest()


def place_of(checkout: Path, environ: Mapping[str, str]) -> Place:
    """The place of a checkout; MAINSAIL_PORT and MAINSAIL_API_PORT override the derived ports."""
    first = FIRST_PORT + 2 * (int(identity(checkout)[8:16], 16) % PORT_PAIRS)
    cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Place(
        checkout=checkout,
        cache=Path(cache) / "mainsail",
        gateway_port=_port(environ, "MAINSAIL_PORT", first),
        api_port=_port(environ, "MAINSAIL_API_PORT", first + 1),
    )


def this_place() -> Place:
    """The place of the checkout that this file lies in."""
    return place_of(Path(__file__).resolve().parents[2], os.environ)


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise StepError(f"{name} is {text!r}", do=f"set {name} to a port number from 1 to 65535, or unset it")
    return int(text)
