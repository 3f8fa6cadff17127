"""The cgroup that every process of one cluster lives in: all that `down` needs to know to end them.

    v1   in each mounted hierarchy, OWN/mainsail-<id>, where OWN is the starter's own group; a cgroup namespace then
         makes it the root of what the kubelet sees, so that two clusters' "kubepods" never meet
    v2   /mainsail-<id> with the cluster's own processes in its child "machine" (a group with controllers for its
         children may hold no process itself); the kubelet is told to work below /mainsail-<id>

A hybrid machine (v1 with a v2 hierarchy that has no controllers) counts as v1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from e2e.steps import StepError

ROOT = Path("/sys/fs/cgroup")
V2_CONTROLLERS = ("cpuset", "cpu", "memory", "pids")
CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy and the folder, in it, of the process that asks."""

    version: int
    controllers: tuple[str, ...]
    mount: Path
    own: Path


def hierarchies(groups: str, mounts: str) -> list[Hierarchy]:
    """From the texts of /proc/self/cgroup and /proc/self/mountinfo; v1 ones where there are any, else the v2 one."""
    own = {frozenset(names.split(",")): path for _, names, path in (line.split(":", 2) for line in groups.splitlines())}
    found = [_hierarchy(line.split(), own) for line in mounts.splitlines()]
    mounted = [hierarchy for hierarchy in found if hierarchy is not None]
    return [one for one in mounted if one.version == 1] or mounted


def _hierarchy(fields: list[str], own: dict[frozenset[str], str]) -> Hierarchy | None:
    dash = fields.index("-")
    kind, options = fields[dash + 1], fields[dash + 3].split(",")
    mount, mount_root = Path(fields[4]), fields[3]
    if kind == "cgroup2":
        return Hierarchy(2, (), mount, mount)
    if kind != "cgroup":
        return None
    for names, path in own.items():
        if names and names <= set(options):
            return Hierarchy(1, tuple(sorted(names)), mount, mount / os.path.relpath(path, mount_root))
    return None


def mount_options(hierarchy: Hierarchy) -> str:
    """What mounts a v1 hierarchy again: its controllers, or its name when it has none."""
    return ",".join(f"none,{one}" if one.startswith("name=") else one for one in hierarchy.controllers)


def current() -> list[Hierarchy]:
    """The hierarchies as this process sees them."""
    found = hierarchies(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    if not found:
        raise StepError("no cgroup hierarchy is mounted", do="mount /sys/fs/cgroup; a container needs --privileged")
    return found


def is_v2() -> bool:
    """Whether this machine has only the unified hierarchy."""
    return current()[0].version == 2


def enter(name: str) -> None:
    """Make the cluster's group and move the calling process into it."""
    for hierarchy in current():
        group = hierarchy.own / name
        try:
            group.mkdir(exist_ok=True)
            member = _prepare_v2(group) if hierarchy.version == 2 else _prepare_v1(group, hierarchy)
            (member / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise StepError(f"cannot enter the cgroup {group}: {error}",
                            do="run it as root on a machine (or in a privileged container) with writable cgroups",
                            ) from error  # fmt: skip


def _prepare_v1(group: Path, hierarchy: Hierarchy) -> Path:
    if "cpuset" in hierarchy.controllers:  # a new group has none, and takes no process before it has some
        for name in CPUSET_FILES:
            (group / name).write_text((group.parent / name).read_text())
    return group


def _prepare_v2(group: Path) -> Path:
    wanted = " ".join(f"+{controller}" for controller in V2_CONTROLLERS)
    for parent in (group.parent, group):
        (parent / "cgroup.subtree_control").write_text(wanted)
    machine = group / "machine"
    machine.mkdir(exist_ok=True)
    return machine


def groups_named(name: str) -> list[Path]:
    """The cluster's groups in all hierarchies, whoever made them and wherever."""
    found: list[Path] = []
    for folder, below, _ in os.walk(ROOT):
        if name in below:
            found.append(Path(folder) / name)
            below.remove(name)
    return found


def processes(groups: Iterable[Path]) -> set[int]:
    """The processes in these groups and in all groups below them."""
    pids: set[int] = set()
    for group in groups:
        for listing in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):  # the group may go while it is read
                pids.update(int(line) for line in listing.read_text().split())
    return pids - {0, os.getpid()}


def end(name: str, *, seconds: float = 20) -> int:
    """Kill every process of the cluster and remove its groups; the number of processes that there were."""
    groups = groups_named(name)
    deadline = time.monotonic() + seconds
    killed: set[int] = set()
    while groups := [group for group in groups if group.exists()]:
        living = processes(groups)
        killed |= living
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _remove_empty(groups)
        if time.monotonic() > deadline:
            raise StepError(
                f"the cgroups {', '.join(map(str, groups))} do not end (processes {sorted(living)})",
                do="see what these processes wait for (state D in `ps`), then run `make down` again",
            )
        time.sleep(0.02)
    return len(killed)


def _remove_empty(groups: Iterable[Path]) -> None:
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):  # busy until its processes are gone: the caller comes again
                os.rmdir(folder)
