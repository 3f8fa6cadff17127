"""The only writer: carries out a plan by server-side apply and patches the status. The Lease fences every write."""

from __future__ import annotations

import logging
from collections.abc import Callable

import httpx2
from lightkube import KubeConfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams

from mainsail_operator.objects import Owner
from mainsail_operator.plan import Action, Apply, Scale
from mainsail_operator.types import GROUP, JSON, PLURAL, VERSION, InferenceServiceStatus

log = logging.getLogger(__name__)

FIELD_MANAGER = "mainsail-operator"
_PATHS = {"ServiceAccount": "/api/v1", "Service": "/api/v1", "Deployment": "/apis/apps/v1"}
_PLURALS = {"ServiceAccount": "serviceaccounts", "Service": "services", "Deployment": "deployments"}


class WriteError(Exception):
    """The API server refused a write; the message is its own."""


class NotLeaderError(Exception):
    """This operator may not write now."""


def kube_client() -> httpx2.AsyncClient:
    """An authenticated client of the API server: the Pod's account, else $KUBECONFIG."""
    config = KubeConfig.from_env().get()
    if config is None:
        raise ValueError("the kubeconfig has no current context")
    return AsyncClient(config, ConnectionParams(trust_env=False))


class Writer:
    def __init__(self, client: httpx2.AsyncClient, may_write: Callable[[], bool]) -> None:
        self._client = client
        self._may_write = may_write

    async def execute(self, owner: Owner, action: Action) -> None:
        """Raises WriteError with the server's message, NotLeaderError when the Lease is not ours."""
        if isinstance(action, Apply):
            kind, name = action.manifest["kind"], action.manifest["metadata"]["name"]
            path = f"{_PATHS[kind]}/namespaces/{owner.namespace}/{_PLURALS[kind]}/{name}"
            await self._patch(path, action.manifest, apply=True)
        else:
            name = action.name
            path = f"/apis/apps/v1/namespaces/{owner.namespace}/deployments/{name}"
            if isinstance(action, Scale):
                await self._patch(path, {"spec": {"replicas": action.replicas}}, apply=False)
            else:
                await self._delete(path)
        log.info("%s/%s: %s %s: %s", owner.namespace, owner.name, type(action).__name__.lower(), name, action.reason)

    async def status(self, owner: Owner, status: InferenceServiceStatus) -> None:
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{owner.namespace}/{PLURAL}/{owner.name}/status"
        await self._patch(path, {"status": status.model_dump(mode="json", by_alias=True)}, apply=False)

    def _fence(self) -> None:
        if not self._may_write():
            raise NotLeaderError

    async def _patch(self, path: str, body: JSON, *, apply: bool) -> None:
        self._fence()
        kind = "apply-patch+yaml" if apply else "merge-patch+json"
        params = {"fieldManager": FIELD_MANAGER} | ({"force": "true"} if apply else {})
        _check(
            await self._client.patch(path, params=params, json=body, headers={"content-type": f"application/{kind}"})
        )

    async def _delete(self, path: str) -> None:
        self._fence()
        response = await self._client.delete(path, params={"propagationPolicy": "Background"})
        if response.status_code != 404:
            _check(response)


def _check(response: httpx2.Response) -> None:
    if response.status_code >= 400:
        try:
            message = str(response.json().get("message"))
        except ValueError:
            message = response.text[:500]
        raise WriteError(f"HTTP {response.status_code}: {message}")
