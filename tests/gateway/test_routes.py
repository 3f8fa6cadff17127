"""The routing table as a function of the cluster's state."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway.routes import EndpointSlice, InferenceService, build


def service(name, *, namespace="default", created="2026-01-01T00:00:00Z", names=None, **engine):
    model = {"uri": "hf://x/y"} | ({"servedNames": names} if names is not None else {})
    meta = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return msgspec.convert({"metadata": meta, "spec": {"model": model, "engine": engine}}, InferenceService)


def piece(owner, *endpoints, namespace="default", port="http", kind="IPv4", name="s"):
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": namespace, "labels": {"mainsail.dev/service": owner}},
            "addressType": kind,
            "endpoints": list(endpoints) or None,
            "ports": [{"name": "health", "port": 8001}, {"name": port, "port": 8000}],
        },
        EndpointSlice,
    )


def pod(address, *, uid="", **conditions):
    return {"addresses": [address], "conditions": conditions, "targetRef": {"name": f"p-{address}", "uid": uid}}


def test_names_and_endpoints():
    table = build(
        [service("a", names=["x", "y", "x"], maxModelLen=4096), service("b")],
        [
            piece("a", pod("10.0.0.1", uid="u1", ready=True)),
            piece("a", pod("10.0.0.2"), name="t"),
            piece("zz", pod("1")),
        ],
    )
    assert set(table.models) == {"x", "y", "b"}
    a = table.models["x"]
    assert a is table.models["y"]
    assert (a.name, a.max_model_len, a.created) == ("a", 4096, 1767225600)
    assert [(e.key, e.host, e.port) for e in a.endpoints] == [
        ("10.0.0.2:8000", "10.0.0.2", 8000),
        ("u1:8000", "10.0.0.1", 8000),
    ]
    assert table.models["b"].endpoints == ()


def test_adapters_are_names_of_their_service():
    meta = {"name": "base", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
    spec = {"adapters": [{"name": "sql", "uri": "hf://org/sql"}, {"name": "poet", "uri": "file:///poet"}]}
    table = build([msgspec.convert({"metadata": meta, "spec": spec}, InferenceService)], [])
    assert table.models["base"].served_names == ("base", "sql", "poet")
    assert table.models["sql"] is table.models["poet"] is table.models["base"]


@pytest.mark.parametrize(("count", "told"), [(3, (5557, 5558)), (2, None)])
def test_an_endpoint_that_tells_of_its_kv_has_both_ports(count, told):
    ports = [{"name": "http", "port": 8000}, {"name": "kv-events", "port": 5557}, {"name": "kv-replay", "port": 5558}]
    labels = {"mainsail.dev/service": "a"}
    piece = {"metadata": {"name": "s", "namespace": "default", "labels": labels}, "ports": ports[:count],
             "endpoints": [pod("10.0.0.1")]}  # fmt: skip
    (endpoint,) = build([service("a")], [msgspec.convert(piece, EndpointSlice)]).models["a"].endpoints
    assert endpoint.kv_events == told


def test_revisions_and_their_weights():
    status = {"revisions": [{"name": "a-77", "weight": 10, "replicas": 1}, {"name": "a-66", "weight": 90}]}
    item = msgspec.convert(
        {"metadata": {"name": "a", "namespace": "default"}, "spec": {"model": {"uri": "x"}}, "status": status},
        InferenceService,
    )
    end = pod("10.0.0.1") | {"targetRef": {"name": "a-77-5d8f-x2x4z"}}
    a = build([item], [piece("a", end)]).models["a"]
    assert a.weights == (("a-77", 10), ("a-66", 90))
    assert a.endpoints[0].revision == "a-77"


@pytest.mark.parametrize("status", [None, {}, {"revisions": None}, {"revisions": [{"name": "a-77", "weight": 0}]}])
def test_no_weights(status):
    item = {"metadata": {"name": "a", "namespace": "default"}, "spec": {"model": {"uri": "x"}}, "status": status}
    assert build([msgspec.convert(item, InferenceService)], []).models["a"].weights == ()


@pytest.mark.parametrize(
    "slices",
    [
        [piece("a", pod("10.0.0.1", ready=False))],
        [piece("a", pod("10.0.0.1", ready=True, terminating=True))],
        [piece("a", pod("10.0.0.1"), port="other")],
        [piece("a", pod("x.example"), kind="FQDN")],
        [piece("a", pod("10.0.0.1"), namespace="other")],
        [piece("a")],
    ],
)
def test_what_is_no_endpoint(slices):
    assert build([service("a")], slices).models["a"].endpoints == ()


def test_a_name_that_two_claim_goes_to_the_older():
    young = service("a", created="2026-02-01T00:00:00Z", names=["m", "own"])
    old = service("b", namespace="other", names=["m"])
    table = build([young, old], [])
    assert table.models["m"].key == ("other", "b")
    assert table.models["own"].key == ("default", "a")
    assert table.conflicts == (("m", ("other", "b"), ("default", "a")),)


@given(st.permutations([service(n, namespace=ns, names=["m", n]) for n in "abc" for ns in ("x", "y")]))
def test_the_order_of_arrival_decides_nothing(services):
    table = build(services, [])
    assert {name: s.key for name, s in table.models.items()} == {
        "m": ("x", "a"), "a": ("x", "a"), "b": ("x", "b"), "c": ("x", "c")
    }  # fmt: skip
    assert len(table.conflicts) == 8
