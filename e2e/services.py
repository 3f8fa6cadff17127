"""InferenceServices as the tests write them, and what a client does with one."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from e2e.kube import HANG_S, Kube, Object, condition, wait_for
from e2e.product import NAMESPACE as SYSTEM

MODEL_URI = "pvc://models/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"


def service(name: str, *, uri: str = MODEL_URI, replicas: int = 1, **engine: Any) -> Object:
    """A small CPU service: enough context for the tests, little memory, no GPU, rolls that do not watch for long, and
    nobody is refused because this machine is slow.

    In float32, so that texts of different batches may be compared (in bfloat16 near ties are frequent)."""
    return {
        "apiVersion": "mainsail.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "model": {"uri": uri},
            "engine": {"maxModelLen": 1024, "maxNumSeqs": 16, "dtype": "float32", "kvCache": {"blocks": 256}} | engine,
            "resources": {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"memory": "3Gi"}},
            "replicas": replicas,
            "rollout": {"minReady": "3s"},
            "admission": {"maxQueueTime": "10m"},
        },
    }


def wait_ready(kube: Kube, name: str, *, serving: int = 1) -> Object:
    """The service once it is Ready for its newest spec, with that many serving replicas and nothing in motion."""

    def check() -> Object | None:
        obj = kube.get("mis", name)
        status = (obj or {}).get("status", {})
        settled = (
            condition(obj, "Ready").get("status") == "True"
            and condition(obj, "Reconciling").get("status") != "True"
            and status.get("observedGeneration") == (obj or {})["metadata"]["generation"]
            and status.get("servingReplicas") == serving
        )
        return obj if settled else None

    return wait_for(f"{name} Ready with {serving} serving", check, story=kube.story)


def client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANG_S, **options)


def wait_routed(url: str, name: str) -> None:
    """Until the gateway lists the model and one request is answered."""

    def check() -> bool:
        body = {"model": name, "prompt": "Hi", "max_tokens": 1}
        try:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=HANG_S).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(f"the gateway answering for {name}", check)


def gateways(kube: Kube) -> list[str]:
    """The gateways' pods."""
    found = kube.list("pods", SYSTEM, "app.kubernetes.io/component=gateway")
    return [pod["metadata"]["name"] for pod in found]


def known_to_gateways(kube: Kube, model: str) -> list[Object]:
    """What each gateway knows of a model: `/debug/routes`."""
    path = "/api/v1/namespaces/{}/pods/{}:8081/proxy/debug/routes?model={}"
    return [json.loads(kube.run("get", "--raw", path.format(SYSTEM, name, model))) for name in gateways(kube)]


def pods(kube: Kube, name: str) -> list[Object]:
    """The service's pods that are not on their way out."""
    found = kube.list("pods", selector=f"mainsail.dev/service={name}")
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


@dataclass
class Traffic:
    """What a steady stream of requests met."""

    completed: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def steady_traffic(
    url: str, model: str, *, streams: int = 2, max_tokens: int = 24, pause_s: float = 0.0, whole: bool = False
) -> Iterator[Traffic]:
    """Clients that stream one answer after another, with a pause between two, until the block ends; every failure is
    kept with its time. whole: they do not stream, so that a tiny model's engine is not faster than those who read it.
    """
    traffic, stop, started = Traffic(), threading.Event(), time.monotonic()

    async def ask(api: openai.AsyncOpenAI) -> None:
        finish = None
        answer = await api.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], stream=not whole,
            max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True},
        )  # fmt: skip
        if whole:
            finish = answer.choices[0].finish_reason
        else:
            async for chunk in answer:
                finish = chunk.choices[0].finish_reason or finish if chunk.choices else finish
        if finish is None:
            raise RuntimeError("the answer ended without a finish reason")

    async def ask_until_stopped(api: openai.AsyncOpenAI) -> None:
        while not stop.is_set():
            try:
                await ask(api)
                traffic.completed += 1
                if pause_s:
                    await asyncio.to_thread(stop.wait, pause_s)
            except Exception as error:
                traffic.failures.append(f"{time.monotonic() - started:.1f} s: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    async def run() -> None:
        api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANG_S)
        async with api:
            await asyncio.gather(*(ask_until_stopped(api) for _ in range(streams)))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        wait_for("the first answers", lambda: traffic.completed >= streams or traffic.failures)
        yield traffic
    finally:
        stop.set()
        thread.join()
