"""The one Go build: Kubernetes, etcd, CoreDNS and helm as one static program, and the pause program beside it.

Cached by the hash of all that decides the binary: the sources with go.sum, the flags, the Go version. A cold build
compiles about 2,900 packages; one program instead of nine means that each is compiled and linked once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import cache
from e2e.cluster.place import Place
from e2e.steps import StepError, read, run

SOURCE = Path(__file__).parent / "kubeall"
FILES = ("go.mod", "go.sum", "main.go", "pause/main.go")
TRIMMED = ("-trimpath", "-buildvcs=false")
GO_MISSING = "install Go 1.21 or later and put `go` on PATH (it fetches the newer one that it needs by itself)"


@dataclass(frozen=True)
class Programs:
    """The two built programs."""

    kubeall: Path
    pause: Path


def kubernetes_version(go_mod: str) -> str:
    """The version of k8s.io/kubernetes that a go.mod requires, without the leading v."""
    found = re.search(r"^\s*k8s\.io/kubernetes v(\d+\.\d+\.\d+)$", go_mod, re.MULTILINE)
    if found is None:
        raise StepError("go.mod requires no k8s.io/kubernetes", do=f"restore {SOURCE / 'go.mod'} from git")
    return found[1]


def linker_flags(version: str) -> str:
    """Stripped, and with the version that a release build would carry."""
    major, minor, _ = version.split(".")
    base = "k8s.io/component-base/version"
    values = {
        f"{base}.gitVersion": f"v{version}",
        f"{base}.gitMajor": major,
        f"{base}.gitMinor": minor,
        f"{base}.gitTreeState": "clean",
        f"{base}.gitCommit": "0" * 40,
        f"{base}.buildDate": "1970-01-01T00:00:00Z",
        "k8s.io/client-go/pkg/version.gitVersion": f"v{version}",
    }
    return " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in values.items())])


def ensure(place: Place) -> Programs:
    """Both programs; builds them when the cache has none of this content."""
    flags = linker_flags(kubernetes_version((SOURCE / "go.mod").read_text()))
    version = read(["go", "env", "GOVERSION", "GOARCH"], cwd=SOURCE, do=GO_MISSING)
    key = cache.key_of(version, flags, *TRIMMED, *((SOURCE / name).read_bytes() for name in FILES))
    log = place.logs / "kubernetes-build.log"
    folder = cache.entry(place.cache, f"kubernetes-{key}", lambda draft: _build(draft, flags, log))
    return Programs(kubeall=folder / "kubeall", pause=folder / "pause")


def _build(draft: Path, flags: str, log: Path) -> None:
    log.unlink(missing_ok=True)
    run(
        ["go", "build", "-v", *TRIMMED, "-ldflags", flags, "-o", f"{draft}/", ".", "./pause"],
        log=log,
        cwd=SOURCE,
        env=build_environment(os.environ),
        do="see the log; a failed download is tried again by running it again",
    )


def build_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """No C compiler, no read-only module cache; fewer garbage collections in the compiler (it has memory enough)."""
    return {"CGO_ENABLED": "0", "GOFLAGS": "-modcacherw", "GOGC": environ.get("GOGC", "300")}


def compiled_packages(log: Path) -> int:
    """How many packages a running build has compiled so far (`go build -v` prints one a line)."""
    if not log.exists():
        return 0
    return sum(1 for line in log.read_text(errors="replace").splitlines() if line and " " not in line)
