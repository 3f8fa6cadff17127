"""The processes of a pod, as the host sees them: to stop, continue or kill one as a failing machine would."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from e2e.kube import Object


def of_pod(pod: Object, program: str) -> list[int]:
    """The pod's processes whose command line names the program."""
    uid = pod["metadata"]["uid"]
    names = {uid, uid.replace("-", "_")}  # the second is systemd's way
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            cgroup, command = (folder / "cgroup").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if any(name in cgroup for name in names) and program.encode() in command:
            found.append(int(folder.name))
    return found


def send(pod: Object, program: str, number: signal.Signals) -> None:
    """Raises AssertionError when the pod has no such process."""
    pids = of_pod(pod, program)
    assert pids, f"pod {pod['metadata']['name']} has no process of {program}"
    for pid in pids:
        os.kill(pid, number)
