"""The store against every order of events, and against lists that tell what a watch has missed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mainsail_operator.handlers import GATEWAYS, Store
from mainsail_operator.relist import Relister, Source
from mainsail_operator.settings import Settings
from mainsail_operator.store import Collection, key_of


def thing(name: str, version: int, *, uid: str = "u", group: str = "g", namespace: str = "n"):
    labels = {"group": group} if group else {}
    return {"metadata": {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": str(version),
                         "labels": labels}}  # fmt: skip


def collection() -> Collection[str]:
    def owner(obj):
        group = obj["metadata"]["labels"].get("group")
        return (obj["metadata"]["namespace"], group) if group else None

    return Collection(owner, lambda obj: f"{obj['metadata']['name']}@{obj['metadata']['resourceVersion']}")


def test_groups_and_versions() -> None:
    held = collection()
    assert held.put(thing("a", 1)) == ("n", "g")
    assert held.put(thing("a", 1)) is None, "nothing new"
    assert held.put(thing("a", 3)) == ("n", "g")
    assert held.put(thing("a", 2)) is None, "older than what is here"
    assert held.of(("n", "g")) == ["a@3"]
    assert held.put(thing("a", 4, group="h")) == ("n", "h")
    assert held.of(("n", "g")) == []
    assert held.put(thing("a", 5, group="")) == ("n", "h"), "a label that went takes the object out"
    assert len(held) == 0


def test_a_late_deletion_does_not_take_the_namesake() -> None:
    held = collection()
    held.put(thing("a", 1, uid="old"))
    held.put(thing("a", 5, uid="new"))
    assert held.remove(thing("a", 4, uid="old")["metadata"]) is None
    assert held.of(("n", "g")) == ["a@5"]


def test_a_list_removes_what_is_gone_and_leaves_what_came_after_it() -> None:
    held = collection()
    for name, version in (("gone", 1), ("kept", 2), ("young", 30)):
        held.put(thing(name, version))
    held.put(thing("elsewhere", 3, namespace="m"))
    assert held.reconcile([thing("kept", 2)], 20, lambda key: key[0] == "n") == {("n", "g")}
    assert sorted(held.of(("n", "g"))) == ["kept@2", "young@30"]
    assert held.of(("m", "g")) == ["elsewhere@3"]


@given(st.data())
@hypothesis_settings(max_examples=200, deadline=None)
def test_events_lost_at_random_are_made_up_for_by_a_list(data: st.DataObject) -> None:
    """A cluster's true history, a watch that loses any events it likes, then one list: the store is true."""
    held, truth, version = collection(), {}, 0
    for _ in range(data.draw(st.integers(1, 25))):
        version += 1
        name = data.draw(st.sampled_from("abc"))
        heard = data.draw(st.booleans())
        if name in truth and data.draw(st.booleans()):
            gone = truth.pop(name)
            if heard:
                held.remove(gone["metadata"])
        else:
            uid = truth[name]["metadata"]["uid"] if name in truth else f"{name}{version}"
            truth[name] = thing(name, version, uid=uid, group=data.draw(st.sampled_from("gh")))
            if heard:
                held.put(truth[name])
    held.reconcile(list(truth.values()), version, lambda _: True)
    for group in "gh":
        wanted = sorted(f"{n}@{o['metadata']['resourceVersion']}" for n, o in truth.items()
                        if o["metadata"]["labels"]["group"] == group)  # fmt: skip
        assert sorted(held.of(("n", group))) == wanted
    assert len(held) == len(truth)


class Api:
    """Pages of one collection, as the API server gives them; fails when told to."""

    def __init__(self) -> None:
        self.items: list[dict] = []
        self.version = 1
        self.status = 200
        self.selectors: list[str] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
                api.selectors.append(query.get("labelSelector", ""))
                start = int(query.get("continue", "0"))
                page = api.items[start : start + 2]
                more = str(start + 2) if start + 2 < len(api.items) else ""
                body = {"metadata": {"resourceVersion": str(api.version), "continue": more}, "items": page}
                data = json.dumps(body).encode()
                self.send_response(api.status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    yield found
    found.server.shutdown()
    found.server.server_close()


async def test_relist_reads_all_pages_and_wakes_whom_it_concerns(api: Api) -> None:
    held, woken = collection(), []
    for name in "abcde":
        held.put(thing(name, 1, group=name))
    api.items, api.version = [thing(name, 1, group=name) for name in "abcd"] + [thing("f", 7, group="f")], 9
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.server.server_port}") as client:
        relister = Relister(client, (), [Source("/api/v1", "things", "group", (held,))], woken.append)
        await relister.sweep()
        assert sorted(woken) == [("n", "e"), ("n", "f")]
        assert set(api.selectors) == {"group"}
        api.status = 500
        with pytest.raises(httpx2.HTTPStatusError):
            await relister.sweep()
    assert len(held) == 5, "a failed list takes nothing away"


def test_the_operators_kinds_are_told_apart() -> None:
    store = Store()
    pod = {
        "metadata": {"name": "p", "namespace": "ns", "uid": "1", "resourceVersion": "1",
                     "labels": {"mainsail.dev/service": "demo", "mainsail.dev/revision": "r"}},
        "status": {"podIP": "10.0.0.1", "phase": "Running"},
    }  # fmt: skip
    gateway = {
        "metadata": {"name": "g", "namespace": "sys", "uid": "2", "resourceVersion": "1",
                     "labels": {"app.kubernetes.io/name": "mainsail", "app.kubernetes.io/component": "gateway"}},
        "status": {"podIP": "10.0.0.2", "phase": "Running"},
    }  # fmt: skip
    for obj in (pod, gateway):
        for held in (store.pods, store.gateway_pods):
            held.put(obj)
    assert [found.name for found in store.pods.of(("ns", "demo"))] == ["p"]
    assert [target.url for target in store.gateways()] == ["http://10.0.0.2:8081/metrics"]
    assert store.gateway_pods.owners() == [GATEWAYS]
    store.services.put({"metadata": {"name": "demo", "namespace": "ns", "resourceVersion": "5", "managedFields": [1]}})
    snapshot = store.read(("ns", "demo"))
    assert snapshot is not None
    assert "managedFields" not in snapshot.body["metadata"]
    assert key_of(snapshot.body["metadata"]) == ("ns", "demo")


def test_only_the_watched_namespaces_services_are_looked_after() -> None:
    store = Store(("a",))
    for namespace in ("a", "b"):
        store.services.put({"metadata": {"name": "demo", "namespace": namespace, "resourceVersion": "1"}})
    assert store.read(("a", "demo")) is not None
    assert store.read(("b", "demo")) is None
    assert Settings(namespace="sys", watch_namespaces=("a",)).listened_namespaces == ("a", "sys")
    assert Settings(namespace="sys").listened_namespaces == ()


def test_a_node_that_goes_concerns_whose_pods_it_had() -> None:
    store = Store()
    assert not store.gone("n1"), "no node is in sight: nothing is known"
    for name in ("n1", "n2"):
        store.nodes.put({"metadata": {"name": name, "uid": name, "resourceVersion": "1"}})
    for service, node in (("a", "n1"), ("b", "n2"), ("c", "")):
        labels = {"mainsail.dev/service": service}
        metadata = {"name": service, "namespace": "ns", "uid": service, "resourceVersion": "1", "labels": labels}
        store.pods.put({"metadata": metadata, "spec": {"nodeName": node} if node else {}})
    assert store.on_node("n1") == {("ns", "a")}
    store.nodes.remove({"name": "n1", "uid": "n1"})
    assert (store.gone("n1"), store.gone("n2")) == (True, False)
