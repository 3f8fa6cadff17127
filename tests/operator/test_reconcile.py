"""Whole passes over one service: reconciler, store and writer, against an API server of a few lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from mainsail_operator.apply import Writer
from mainsail_operator.handlers import Store
from mainsail_operator.lease import Lease
from mainsail_operator.reconcile import Reconciler, Snapshot
from mainsail_operator.settings import Settings
from mainsail_operator.signals import Signals
from mainsail_operator.sizing import Sizer
from mainsail_operator.store import Key

KEY = ("ns", "demo")
SERVICE = "/apis/mainsail.dev/v1alpha1/namespaces/ns/inferenceservices/demo"
Json = dict[str, Any]


def merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    found = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        found[key] = merged(found.get(key), value)
        if value is None:
            del found[key]
    return found


@dataclass
class Api:
    """Objects by path. An apply takes over what it names whole; a write that changes nothing makes no version."""

    objects: dict[str, Json] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Part of a path → why writes to such an object are refused."""
    code: int = 403
    """And how."""
    mutated: str = ""
    """Part of a path of objects that a webhook changes back to what they are."""
    writes: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    version: int = 0

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        if request.method == "GET":
            found = self.objects.get(path)
            return httpx2.Response(200, json=found) if found else httpx2.Response(404, json={"message": "not found"})
        body = json.loads(request.content)
        if request.method == "POST":
            self.events.append(body["reason"])
            return httpx2.Response(201, json=body)
        self.writes.append(f"{request.method} {'/'.join(path.split('/')[-2:])}")
        for part, why in self.refused.items():
            if part in path:
                return httpx2.Response(self.code, json={"message": why})
        if request.method == "DELETE":
            self.objects.pop(path, None)
            return httpx2.Response(200, json={})
        if self.mutated and self.mutated in path:
            return httpx2.Response(200, json=self.objects[path])
        return httpx2.Response(200, json=self.put(path.removesuffix("/status"), body))

    def put(self, path: str, patch: Json) -> Json:
        """Set what the patch names."""
        old = self.objects.get(path, {})
        patch = merged(patch, {"metadata": {"resourceVersion": None}})
        new = merged(old, patch)
        if new != old:
            self.version += 1
            new["metadata"] |= {"resourceVersion": str(self.version), "uid": old.get("metadata", {}).get("uid", path)}
            new["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        self.objects[path] = new
        return new


@dataclass
class Operator:
    api: Api
    store: Store
    reconciler: Reconciler
    read: Callable[[Key], Snapshot | None]

    def hear(self, **spec: Any) -> None:
        """The service changes, and the watch says so."""
        known = self.api.objects.get(SERVICE, {"metadata": {"generation": 0}})
        metadata = {"name": "demo", "namespace": "ns", "generation": known["metadata"]["generation"] + 1}
        self.store.services.put(self.api.put(SERVICE, {"metadata": metadata, "spec": spec}))

    async def passes(self, count: int = 1) -> list[str]:
        """So many passes, one after another; what they wrote."""
        self.api.writes.clear()
        left, over = count, asyncio.Event()

        def read(key: Key) -> Snapshot | None:
            nonlocal left
            left -= 1
            if left < 0:
                over.set()
                return None
            self.reconciler.wake(key)
            return self.store.read(key)

        self.read = read
        self.reconciler.wake(KEY)
        await over.wait()
        return list(self.api.writes)

    def conditions(self) -> dict[str, tuple[str, str]]:
        told = self.api.objects[SERVICE]["status"]["conditions"]
        return {one["type"]: (one["status"], one["reason"]) for one in told}


@pytest.fixture
async def operator() -> AsyncIterator[Operator]:
    api, store, signals = Api(), Store(), Signals()
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(api.answer), base_url="http://api") as client:
        lease = Lease(client, "system", "me")
        lease.acquired.set()
        writer = Writer(client, lambda: True, "me", store.heard)
        reconciler = Reconciler(
            writer, lease, Settings(), lambda key: found.read(key), lambda _key, _targets: None, signals,
            Sizer(signals, lambda _: None),
        )  # fmt: skip
        found = Operator(api, store, reconciler, store.read)
        found.hear(model={"uri": "pvc://models/m.gguf"}, replicas=0)
        yield found
        await reconciler.close()


async def test_what_is_settled_is_written_no_more(operator: Operator) -> None:
    written = await operator.passes(3)
    assert len(written) == len(set(written)) + 1, "the status twice, each child once"
    assert operator.conditions()["RolloutComplete"] == ("True", "Complete")
    assert await operator.passes(2) == []


async def test_the_status_of_a_newer_operator_is_gone_on_from(operator: Operator) -> None:
    """Fields that this one does not know stay where they are: a merge patch never takes them away."""
    await operator.passes(3)
    operator.api.events.clear()
    before = operator.api.objects[SERVICE]["status"]
    novel = {"novel": "x", "rollout": {"novel": 1}}
    operator.store.services.put(operator.api.put(SERVICE, {"status": novel}))
    assert await operator.passes(3) == []
    assert operator.api.objects[SERVICE]["status"] == merged(before, novel)
    assert operator.api.events == []


@pytest.mark.parametrize("code", [403, 500])
async def test_a_child_that_is_refused_holds_up_nothing_that_is_there(operator: Operator, code: int) -> None:
    """A policy of the cluster refuses NetworkPolicies from now on, or its webhook is down, and somebody deletes ours:
    still it scales."""
    operator.api.code = code
    await operator.passes(3)
    for path in [path for path in operator.api.objects if "networkpolicies" in path]:
        operator.store.children["networkpolicies"].remove(operator.api.objects.pop(path)["metadata"])
    operator.api.refused = {"networkpolicies": "no policies here"}
    operator.hear(replicas=3)
    await operator.passes(2)
    (deployment,) = (it for path, it in operator.api.objects.items() if "/deployments/" in path)
    assert deployment["spec"]["replicas"] == 3
    if code == 403:
        assert operator.conditions()["Stalled"] == ("True", "WriteRefused")
    operator.hear(engine={"maxNumSeqs": 8})
    await operator.passes()
    assert sum("/deployments/" in path for path in operator.api.objects) == 1, "no pods without what is to guard them"


async def test_what_somebody_changes_of_ours_is_set_right_and_not_fought_over(operator: Operator) -> None:
    await operator.passes(3)
    path = next(path for path in operator.api.objects if "networkpolicies" in path)
    right = operator.api.objects[path]["spec"]
    for mutated in ("", "networkpolicies"):
        operator.store.children["networkpolicies"].put(operator.api.put(path, {"spec": {"ingress": [{}]}}))
        operator.api.mutated = mutated
        assert await operator.passes(3) == ["PATCH networkpolicies/demo"]
        assert (operator.api.objects[path]["spec"] == right) == (not mutated)
