"""The only writer: carries out a plan by server-side apply, patches the status, tells events.

Two things keep an operator that has lost its leadership, or looks at an old picture, from doing harm: the Lease is
asked before every write, and every write to an object that exists names the version that it was decided on, so that
the API server itself refuses what was decided on an older one (a leader that was stopped between question and write).
What exists and belongs to somebody else is never taken over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

import httpx2
from lightkube import KubeConfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.kubeconfig import SingleConfig

from mainsail_operator.events import Event
from mainsail_operator.objects import DELETION_COST, Owner
from mainsail_operator.plan import Action, Apply, Delete, Forget, Mark, Scale
from mainsail_operator.types import API_VERSION, GROUP, JSON, KIND, PLURAL, VERSION, InferenceServiceStatus
from mainsail_operator.types.route import ROUTE_PLURAL, ModelRouteStatus

log = logging.getLogger(__name__)

FIELD_MANAGER = "mainsail-operator"
MAX_CONCURRENT = 24
"""Writes at a time: with a thousand at once, the Lease's renewal would wait behind them until it is lost."""
_PATHS: dict[str, tuple[str, str]] = {
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Service": ("/api/v1", "services"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "LeaderWorkerSet": ("/apis/leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
    "DaemonSet": ("/apis/apps/v1", "daemonsets"),
    "Job": ("/apis/batch/v1", "jobs"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
}
Heard = Callable[[str, JSON], None]
"""Plural and object: what the API server answered is what is there now, before the watch says so."""


class WriteError(Exception):
    """A write failed; the message is the API server's own."""


class RefusedError(WriteError):
    """The API server refuses it, and will until somebody changes something."""


class StaleError(Exception):
    """The object has changed since the decision: look again."""


class NotLeaderError(Exception):
    """This operator may not write now."""


def kube_client() -> httpx2.AsyncClient:
    """An authenticated client of the API server: the Pod's account, else $KUBECONFIG."""
    return AsyncClient(_kube_config(), ConnectionParams(trust_env=False))


def current_namespace() -> str:
    """The Pod's own, or that of the kubeconfig's current context."""
    return _kube_config().namespace


def _kube_config() -> SingleConfig:
    config = KubeConfig.from_env().get()
    if config is None:
        raise ValueError("the kubeconfig has no current context")
    return config


class Writer:
    def __init__(
        self, client: httpx2.AsyncClient, may_write: Callable[[], bool], identity: str = "", heard: Heard | None = None
    ) -> None:
        self._client = client
        self._may_write = may_write
        self._identity = identity
        self._heard: Heard = heard or (lambda _plural, _obj: None)
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def execute(self, owner: Owner, action: Action) -> None:
        """Raises RefusedError and WriteError with the server's message, StaleError, NotLeaderError."""
        async with self._slots:
            await self._execute(owner, action)

    async def _execute(self, owner: Owner, action: Action) -> None:
        match action:
            case Apply(manifest):
                name = f"{manifest['kind']} {manifest['metadata']['name']}"
                await self._apply(owner, manifest)
            case Scale(name, replicas, _, version, kind):
                patch: JSON = {"spec": {"replicas": replicas}, "metadata": _at(version)}
                await self._patch(kind, owner.namespace, name, patch)
            case Mark(name, cost):
                await self._mark(owner.namespace, name, cost)
            case Forget(name, uid, node):
                await self._forget(owner.namespace, name, uid, node)
            case Delete(name, _, version, kind):
                await self._delete(kind, owner.namespace, name, version)
        log.info("%s/%s: %s %s: %s", owner.namespace, owner.name, type(action).__name__.lower(), name, action.reason)

    async def status(self, owner: Owner, status: InferenceServiceStatus, version: str) -> None:
        """version: the resourceVersion of the object that the status was decided on."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{owner.namespace}/{PLURAL}/{owner.name}/status"
        body = {"metadata": _at(version), "status": status.model_dump(mode="json", by_alias=True)}
        async with self._slots:
            self._heard(PLURAL, await self._merge(path, body, f"status of {owner.name}"))

    async def tell(self, owner: Owner, event: Event, now: float) -> None:
        """Post an event. One that is lost is not worth a failed pass."""
        stamp = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        regarding = {"apiVersion": API_VERSION, "kind": KIND, "namespace": owner.namespace, "name": owner.name,
                     "uid": owner.uid}  # fmt: skip
        body: JSON = {
            "metadata": {"generateName": f"{owner.name}-", "namespace": owner.namespace},
            "eventTime": stamp, "type": event.kind, "reason": event.reason, "note": event.message[:1000],
            "action": "Reconcile", "regarding": regarding,
            "reportingController": "mainsail.dev/operator", "reportingInstance": self._identity[:128] or "operator",
        }  # fmt: skip
        self._fence()
        try:
            path = f"/apis/events.k8s.io/v1/namespaces/{owner.namespace}/events"
            _check(await self._client.post(path, json=body), "event")
        except (WriteError, httpx2.HTTPError) as error:
            log.info("%s/%s: the event %s was not told: %s", owner.namespace, owner.name, event.reason, error)

    async def route_status(self, key: tuple[str, str], status: ModelRouteStatus) -> None:
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{key[0]}/{ROUTE_PLURAL}/{key[1]}/status"
        await self._merge(path, {"status": status.model_dump(mode="json", by_alias=True)}, f"status of {key[1]}")

    def _fence(self) -> None:
        if not self._may_write():
            raise NotLeaderError

    async def _apply(self, owner: Owner, manifest: JSON) -> None:
        kind, name = str(manifest["kind"]), str(manifest["metadata"]["name"])
        path = _path(kind, owner.namespace, name)
        self._fence()
        there = await self._client.get(path)
        if there.status_code != 404:
            _check(there, f"{kind} {name}")
            _check_owner(owner, kind, name, there.json())
        self._fence()
        answer = await self._client.patch(
            path, params={"fieldManager": FIELD_MANAGER, "force": "true"}, json=manifest,
            headers={"content-type": "application/apply-patch+yaml"},
        )  # fmt: skip
        _check(answer, f"{kind} {name}")
        self._heard(_PATHS[kind][1], answer.json())

    async def _patch(self, kind: str, namespace: str, name: str, patch: JSON) -> None:
        self._heard(_PATHS[kind][1], await self._merge(_path(kind, namespace, name), patch, f"{kind} {name}"))

    async def _mark(self, namespace: str, name: str, cost: int) -> None:
        """A pod that is gone meanwhile needs no mark."""
        patch = {"metadata": {"annotations": {DELETION_COST: str(cost)}}}
        try:
            await self._merge(f"/api/v1/namespaces/{namespace}/pods/{name}", patch, f"Pod {name}")
        except StaleError:
            log.info("%s/%s: the pod is gone", namespace, name)

    async def _forget(self, namespace: str, name: str, uid: str, node: str) -> None:
        """The API server has the last word on whether the node is gone: a watch may be behind."""
        self._fence()
        there = await self._client.get(f"/api/v1/nodes/{node}")
        if there.status_code != 404:
            _check(there, f"Node {node}")
            raise StaleError(f"node {node} is there")
        self._fence()
        options: JSON = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        answer = await self._client.request("DELETE", path, json=options)
        if answer.status_code != 404:
            _check(answer, f"Pod {name}")

    async def _merge(self, path: str, patch: JSON, what: str) -> JSON:
        self._fence()
        answer = await self._client.patch(
            path, params={"fieldManager": FIELD_MANAGER}, json=patch,
            headers={"content-type": "application/merge-patch+json"},
        )  # fmt: skip
        _check(answer, what)
        return answer.json()

    async def _delete(self, kind: str, namespace: str, name: str, version: str) -> None:
        self._fence()
        options: JSON = {"propagationPolicy": "Background"}
        if version:
            options["preconditions"] = {"resourceVersion": version}
        answer = await self._client.request("DELETE", _path(kind, namespace, name), json=options)
        if answer.status_code != 404:
            _check(answer, f"{kind} {name}")


def _path(kind: str, namespace: str, name: str) -> str:
    base, plural = _PATHS[kind]
    return f"{base}/namespaces/{namespace}/{plural}/{name}"


def _at(version: str) -> JSON:
    """The part of a patch that makes the API server refuse it when the object has changed."""
    return {"resourceVersion": version} if version else {}


def _check_owner(owner: Owner, kind: str, name: str, there: JSON) -> None:
    """Raises RefusedError for an object that is not this service's. One that an ended namesake left goes by itself."""
    if there["metadata"].get("deletionTimestamp"):
        raise StaleError(f"{kind} {name} is being deleted")
    references = cast("list[JSON]", there["metadata"].get("ownerReferences") or [])
    if any(reference.get("uid") == owner.uid for reference in references):
        return
    if any(reference.get("kind") == KIND and reference.get("name") == owner.name for reference in references):
        raise StaleError(f"{kind} {name} still belongs to an InferenceService of this name that was deleted")
    raise RefusedError(
        f"{kind} {owner.namespace}/{name} exists and does not belong to this InferenceService: it is left alone. "
        f"Delete it, or give the InferenceService another name."
    )


def _check(answer: httpx2.Response, what: str) -> None:
    """Raises StaleError, RefusedError or WriteError for an answer that is none of success."""
    code = answer.status_code
    if code < 400:
        return
    try:
        message = str(answer.json().get("message"))
    except ValueError:
        message = answer.text[:500]
    if code in (404, 409):
        raise StaleError(f"{what}: {message}")
    # The API server answers 500 to a field that no schema knows in an apply.
    if (code < 500 and code not in (408, 429)) or "typed patch object" in message:
        raise RefusedError(f"{what}: {message}")
    raise WriteError(f"{what}: HTTP {code}: {message}")
