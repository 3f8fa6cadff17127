"""The load decides the replicas: a queue, preemptions alone, free GPUs, to zero and back; nothing is lost on the way.

Three services run at once, because starting engines is what takes the time. All run a tiny model of random weights.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from e2e import tiny
from e2e.cluster.network import NODE
from e2e.cluster.place import Place
from e2e.kube import HANG_S, Kube, KubectlError, Object, condition, wait_for
from e2e.services import Traffic, client, pods, service, steady_traffic, wait_ready, wait_routed

GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module", autouse=True)
def model(cluster: Place) -> str:
    tiny.write(cluster.models / "tiny")
    return "pvc://models/tiny"


def scaled(name: str, scaling: Object, resources: Object | None = None, **engine: object) -> Object:
    found = service(name, uri="pvc://models/tiny", **engine)
    del found["spec"]["replicas"]
    found["spec"]["scaling"] = scaling
    found["spec"]["resources"]["limits"] |= resources or {}
    return found


def scaling_of(kube: Kube, name: str) -> Object:
    return (kube.get("mis", name) or {}).get("status", {}).get("scaling", {})


def limited_by(obj: Object | None) -> str:
    return (obj or {}).get("status", {}).get("scaling", {}).get("limitedBy", "")


def wait_desired(kube: Kube, name: str, desired: int, *, serving: int | None = None) -> Object:
    def check() -> Object | None:
        status = (kube.get("mis", name) or {}).get("status", {})
        right = status.get("scaling", {}).get("desired") == desired
        return status if right and status.get("servingReplicas") == (desired if serving is None else serving) else None

    def story() -> str:
        return f"{scaling_of(kube, name)}\n{kube.story()}"

    return wait_for(f"{name} with {desired} replicas", check, story=story)["scaling"]


def give_gpus(kube: Kube, count: int) -> None:
    """Documented practice: an extended resource in the node's status (kubernetes.io: advertise extended resources)."""
    patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
    kube.run("patch", "node", NODE, "--subresource=status", "--type=json", "-p", json.dumps(patch))


@contextmanager
def applied(kube: Kube, *services: Object) -> Iterator[None]:
    kube.apply(*services)
    try:
        yield
    finally:
        for one in services:
            kube.delete("mis", one["metadata"]["name"], wait=False)


def test_queue_preemptions_and_zero(kube: Kube, gateway_url: str) -> None:
    give_gpus(kube, 2)
    quick = {"scaleDown": {"stabilization": "10s"}}
    # A queue that is far beyond its target, so that it is so whenever the answers of the moment have let it drain.
    queue = scaled("queue", {"max": 3, "targets": {"queueDepth": 1}, **quick}, {GPU: 1}, maxNumSeqs=2, maxModelLen=512)
    # 48 blocks hold one sequence of the longest kind and a little: two at once preempt one another again and again.
    # Neither the queue nor the usage can reach their targets.
    alone = {"queueDepth": 1000, "kvUsage": 1}
    pressed = scaled("pressed", {"max": 2, "targets": alone}, maxNumSeqs=4, maxModelLen=700, kvCache={"blocks": 48})
    asleep = scaled("asleep", {"min": 0, "max": 1, "toZero": {"after": "5s"}})
    with applied(kube, queue, pressed, asleep), ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(one, kube, gateway_url) for one in (_queue, _pressed, _asleep)]
        for run in runs:
            run.result()


def _queue(kube: Kube, url: str) -> None:
    """1 → 2, as many as there are GPUs → 3 when there are more → 1; no request is lost."""
    wait_ready(kube, "queue")
    wait_routed(url, "queue")
    # Whole answers: clients wait for engines, whichever are faster on this machine, and no engine for its clients.
    with steady_traffic(url, "queue", streams=30, max_tokens=200, whole=True) as traffic:
        told = wait_desired(kube, "queue", 2)
        assert told["reason"] == "QueueDepth"
        assert "wait, target 1" in told["message"]
        limited = wait_for("limited by GPUs", lambda: limited_by(obj := kube.get("mis", "queue")) == "GPUs" and obj,
                           story=lambda: f"{scaling_of(kube, 'queue')}\n{kube.story()}")  # fmt: skip
        assert condition(limited, "ScalingActive")["reason"] == "LimitedByGpus"
        give_gpus(kube, 3)
        wait_desired(kube, "queue", 3)
    # A trickle is little beside what a full replica carried, which on a busy machine may be a request in two seconds.
    with steady_traffic(url, "queue", streams=1, max_tokens=24, pause_s=20.0) as trickle:
        told = wait_desired(kube, "queue", 1)
        assert told["reason"] == "LowLoad"
        wait_for("one pod left", lambda: len(pods(kube, "queue")) == 1, story=kube.story)
    assert traffic.failures == []
    assert trickle.failures == []
    assert kube.get("mis", "queue")["spec"]["replicas"] == 1, "the spec is the user's"


def _pressed(kube: Kube, url: str) -> None:
    wait_ready(kube, "pressed")
    wait_routed(url, "pressed")
    with steady_traffic(url, "pressed", streams=4, max_tokens=450, whole=True) as traffic:
        told = wait_desired(kube, "pressed", 2)
    assert told["reason"] == "Preemptions", told
    assert traffic.failures == []


def _asleep(kube: Kube, url: str) -> None:
    """It starts one replica to prove itself, stops it when nothing is asked, and a request brings it back."""
    wait_ready(kube, "asleep")
    wait_desired(kube, "asleep", 0)
    wait_for("no pod left", lambda: not pods(kube, "asleep"), story=kube.story)
    assert condition(kube.get("mis", "asleep"), "Ready")["reason"] == "ScaledToZero"
    asked = time.monotonic()
    with client(url) as api:
        answer = api.completions.create(model="asleep", prompt="Wake up", max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3
    told = scaling_of(kube, "asleep")
    assert told["reason"] in ("Woken", "HeldRequests")
    print(f"from zero to an answer in {time.monotonic() - asked:.1f} s")


def test_replicas_and_scaling_exclude_one_another(kube: Kube) -> None:
    one = scaled("either", {"min": 0, "max": 2})
    one["spec"]["replicas"] = 2
    with pytest.raises(KubectlError, match="exclude one another"):
        kube.apply(one)


def test_kubectl_scale_and_whoever_writes_the_scale_subresource(kube: Kube) -> None:
    with applied(kube, service("byhand", uri="pvc://models/tiny", replicas=0)):
        kube.run("scale", "mis", "byhand", "--replicas=1")
        ready = wait_ready(kube, "byhand")
        assert ready["spec"]["replicas"] == ready["status"]["scaling"]["desired"] == 1
        scale = json.loads(kube.run("get", "mis", "byhand", "--subresource=scale", "-o", "json"))
        assert scale["status"]["replicas"] == 1
        assert scale["status"]["selector"] == "mainsail.dev/service=byhand"


def test_held_sessions_make_it_grow(kube: Kube, gateway_url: str) -> None:
    """More agents between turns than one replica has KV for: gateways hold turns, and nothing else asks for more."""
    alone = {"queueDepth": 1000, "kvUsage": 1, "preemptionsPerMinute": 1000}
    agents = scaled("agents", {"max": 2, "targets": alone}, maxNumSeqs=4, maxModelLen=2048, kvCache={"blocks": 130})
    with applied(kube, agents):
        wait_ready(kube, "agents")
        wait_routed(gateway_url, "agents")
        with conversations(gateway_url, "agents", 12) as traffic:
            told = wait_desired(kube, "agents", 2, serving=1)
        assert told["reason"] == "HeldSessions", told
        assert "agent sessions are held or parked" in told["message"]
        assert traffic.failures == []


@contextmanager
def conversations(url: str, model: str, count: int) -> Iterator[Traffic]:
    """Agents: each turn repeats all before it, with a tool's pause in between; they begin anew when they are long."""
    traffic, stop = Traffic(), threading.Event()

    def talk(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=url, timeout=HANG_S) as api:
            while not stop.is_set():
                messages: list[Object] = []
                for turn in range(4):
                    said = "".join(rng.choices("abcdefgh ", k=1100 if turn == 0 else 100))
                    messages.append({"role": "user", "content": said})
                    body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
                    answer = api.post("/v1/chat/completions", json=body)
                    if answer.status_code != 200:
                        traffic.failures.append(answer.text)
                        return
                    traffic.completed += 1
                    messages.append(answer.json()["choices"][0]["message"])
                    stop.wait(0.5)

    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(talk, number) for number in range(count)]
        try:
            yield traffic
        finally:
            stop.set()
            for run in runs:
                run.result()
