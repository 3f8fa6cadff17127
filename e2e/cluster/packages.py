"""The node's programs that are not Go of ours to build: Debian packages, unpacked under the cache, never installed.

Downloaded by apt with the machine's own sources, so they fit the C library that is here. Programs are looked for
in the unpacked folder first and then on the host.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import cache
from e2e.cluster.place import Place
from e2e.steps import StepError, run

NAMES = ("conntrack", "containerd", "containernetworking-plugins", "iproute2", "nftables", "openssl", "runc")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Packages:
    """The folder that the packages were unpacked in, laid out like a file system's root."""

    root: Path

    def program(self, name: str) -> Path:
        """The path of a program, unpacked or on the host."""
        for folder in self.path.split(":"):
            if os.access(candidate := Path(folder) / name, os.X_OK):
                return candidate
        raise StepError(
            f"the program {name} is neither in {self.root} nor on this machine",
            do=f"remove {self.root.parent} and run it again: the packages are then unpacked anew",
        )

    @property
    def path(self) -> str:
        """A PATH of the unpacked folders and then the host's."""
        unpacked = [str(self.root / folder) for folder in ("usr/sbin", "usr/bin", "sbin", "bin")]
        return ":".join([*unpacked, SYSTEM_PATH])

    def environment(self) -> dict[str, str]:
        """What the unpacked programs need to find each other and their libraries."""
        library = f"usr/lib/{platform.machine()}-linux-gnu"
        return {"PATH": self.path, "LD_LIBRARY_PATH": str(self.root / library)}


def ensure(place: Place) -> Packages:
    """The unpacked packages; downloads them when the cache has none for this release of Debian."""
    key = cache.key_of(" ".join(NAMES), _release(), platform.machine())
    log = place.logs / "packages.log"
    folder = cache.entry(place.cache, f"debian-{key}", lambda draft: _make(draft, log))
    return Packages(folder / "root")


def _release() -> str:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError as error:
        raise StepError("this machine has no /etc/os-release", do="use Debian 12 or a later one") from error
    return "\n".join(sorted(line for line in lines if line.startswith(("ID=", "VERSION_ID="))))


def _make(draft: Path, log: Path) -> None:
    archives, root = draft / "archives", draft / "root"
    (archives / "partial").mkdir(parents=True)
    root.mkdir()
    try:
        _download(archives, log)
    except StepError:  # a fresh machine has no lists of packages yet, an old one has outdated ones
        run(["apt-get", "update"], log=log, do="see why apt cannot read the package lists (network, sources.list)")
        _download(archives, log)
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", archive, root], log=log, do=f"remove {archive.parent.parent} and run it again")


def _download(archives: Path, log: Path) -> None:
    run(
        ["apt-get", "install", "--yes", "--no-install-recommends", "--download-only", "--reinstall",
         "-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=300",
         *NAMES],
        log=log, do="see why apt cannot download the packages (network, sources.list)",
    )  # fmt: skip
