"""kubectl, as the tests use it: apply, read, patch, and wait on conditions with a reason when the wait fails.

The real kubectl is the client on purpose: what the tests prove is what a user at a terminal gets, messages included.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]
HANG_S = 300
"""What ends a wait that would never end: many times what anything took on two idle cores, so that a slow machine does
not decide a test."""


class KubectlError(RuntimeError):
    """kubectl ended with an error; the message is what it printed to stderr."""


@dataclass(frozen=True)
class Kube:
    kubectl: str
    kubeconfig: Path

    def run(self, *arguments: str, stdin: str | None = None, timeout_s: float = HANG_S) -> str:
        done = subprocess.run(
            [self.kubectl, *arguments],
            input=stdin,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise KubectlError(done.stderr.strip())
        return done.stdout

    def apply(self, *objects: Object) -> str:
        """Server-side apply with strict field validation, as a GitOps pipeline would."""
        manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        return self.run(
            "apply", "--server-side", "--field-manager=e2e", "--force-conflicts", "--validate=strict", "-f", "-",
            stdin=manifest,
        )  # fmt: skip

    def get(self, kind: str, name: str, namespace: str = "default") -> Object | None:
        out = self.run("get", kind, name, "-n", namespace, "-o", "json", "--ignore-not-found")
        return json.loads(out) if out.strip() else None

    def list(self, kind: str, namespace: str = "default", selector: str = "") -> list[Object]:
        out = self.run("get", kind, "-n", namespace, "-l", selector, "-o", "json")
        return json.loads(out)["items"]

    def patch(self, kind: str, name: str, patch: Object, namespace: str = "default") -> None:
        self.run("patch", kind, name, "-n", namespace, "--type=merge", "-p", json.dumps(patch))

    def delete(self, kind: str, name: str, namespace: str = "default", *, wait: bool = True) -> None:
        self.run("delete", kind, name, "-n", namespace, "--ignore-not-found", f"--wait={str(wait).lower()}")

    def story(self, namespace: str = "default") -> str:
        """What a person would look at first when a wait fails."""
        parts = [
            self.run("get", "mis,deploy,pods", "-n", namespace, "-o", "wide"),
            self.run(
                "get", "mis", "-n", namespace, "-o", "jsonpath={range .items[*]}{.metadata.name} {.status}{'\\n'}"
            ),
            self.run("get", "events", "-n", namespace, "--sort-by=.lastTimestamp"),
        ]
        return "\n".join(parts)[-6000:]


def wait_for(
    what: str, check: Callable[[], Any], *, timeout_s: float = HANG_S, story: Callable[[], str] | None = None
) -> Any:
    """Poll `check` until it returns something true; its value is returned. On time-out the story is in the message.

    An API server that is too busy for an answer is asked again."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = check()
        except KubectlError as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s:g} s: {what} (last: {last!r})\n{story() if story else ''}")


def wait_still(what: str, read: Callable[[], Any], *, quiet_s: float = 3.0) -> Any:
    """What `read` returns once it has returned the same for a while: controllers' last words come after what they are
    about."""
    found, since = read(), time.monotonic()

    def still() -> bool:
        nonlocal found, since
        if (now := read()) != found:
            found, since = now, time.monotonic()
        return time.monotonic() - since >= quiet_s

    wait_for(what, still, story=lambda: f"{found}")
    return found


def condition(obj: Object | None, kind: str) -> Object:
    """The condition of that type, or an empty dict."""
    conditions = (obj or {}).get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})
