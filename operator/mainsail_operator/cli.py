"""`mainsail-operator rollout …`, also the kubectl plugin `kubectl mis rollout …`: look at a rollout, and steer it.

    kubectl mis rollout status  NAME     where it stands, and why
    kubectl mis rollout pause   NAME     hold where it is (a bad revision is still taken back)
    kubectl mis rollout resume  NAME
    kubectl mis rollout promote NAME     skip the rest of the gate
    kubectl mis rollout rollback NAME    back to the stable revision
    kubectl mis rollout retry   NAME     try a revision again that was rolled back

A command is an annotation (`mainsail.dev/rollout`), so `kubectl annotate` does the same; here it gets a time, which
makes it a new one. Talks to the cluster of $KUBECONFIG.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import cast

import httpx2

from mainsail_operator.apply import current_namespace, kube_client
from mainsail_operator.rollout import COMMAND
from mainsail_operator.types import GROUP, JSON, PLURAL, VERSION

VERBS = ("status", "pause", "resume", "promote", "rollback", "retry")
_LASTING = {"pause": "pause", "resume": None}
"""Verbs that hold for as long as the annotation is there, and what it then says."""


def parser(prog: str, more: str = "") -> argparse.ArgumentParser:
    """more: what --help says at its end."""
    made = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)
    rollout = commands.add_parser("rollout", help="look at a rollout, and steer it")
    rollout.add_argument("verb", choices=VERBS, help="what to do")
    rollout.add_argument("name", help="the InferenceService")
    rollout.add_argument("-n", "--namespace", help="where it is (default: as kubectl's, of the current context)")
    return made


def annotation(verb: str, now: datetime) -> str | None:
    """What the annotation is to say; None: it is removed."""
    return _LASTING[verb] if verb in _LASTING else f"{verb}@{now.strftime('%Y-%m-%dT%H:%M:%SZ')}"


def told(obj: JSON) -> str:
    """A rollout in words, for a terminal."""
    status = cast(JSON, obj.get("status") or {})
    rollout = cast(JSON, status.get("rollout") or {})
    if not rollout:
        return "no rollout yet: the operator has not looked at this service"
    step = f", step {rollout['step']}" if rollout.get("step") else ""
    lines = [
        f"{rollout.get('phase')}{step} since {rollout.get('since')}: {rollout.get('reason')}",
        str(rollout.get("message") or ""),
        f"{'REVISION':<60} {'WEIGHT':>6} {'SERVING':>8}",
    ]
    roles = {rollout.get("stable"): "stable", rollout.get("target"): "target"}
    for revision in cast("list[JSON]", status.get("revisions") or []):
        name = f"{revision['name']} ({roles.get(revision['name'], 'superseded')})"
        lines.append(f"{name:<60} {revision['weight']:>5}% {revision['serving']:>4}/{revision['replicas']}")
    return "\n".join(line for line in lines if line)


async def run(verb: str, namespace: str, name: str, client: httpx2.AsyncClient) -> str:
    """What to print. Raises httpx2.HTTPError; ValueError with the API server's words."""
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}"
    if verb == "status":
        answer = await client.get(path)
    else:
        patch = {"metadata": {"annotations": {COMMAND: annotation(verb, datetime.now(UTC))}}}
        answer = await client.patch(path, json=patch, headers={"content-type": "application/merge-patch+json"})
    body: JSON = answer.json()
    if answer.status_code >= 400:
        raise ValueError(str(body.get("message")))
    return told(body) if verb == "status" else f"{namespace}/{name}: {verb}"


async def _main(options: argparse.Namespace) -> str:
    async with kube_client() as client:
        return await run(options.verb, options.namespace or current_namespace(), options.name, client)


def main(argv: Sequence[str] | None = None, prog: str = "kubectl mis", more: str = "") -> None:
    """The plugin's entry point."""
    options = parser(prog, more).parse_args(argv)
    try:
        print(asyncio.run(_main(options)))
    except (httpx2.HTTPError, OSError, ValueError) as error:
        sys.exit(f"error: {error or type(error).__name__}")
