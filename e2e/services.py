"""InferenceServices as the tests write them, and what a client does with one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from e2e.kube import Kube, Object, condition, wait_for

MODEL_URI = "pvc://models/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
READY_S = 180
"""Bound on a pod's way to Ready on two busy cores: torch alone takes ten seconds to import there."""


def service(name: str, *, uri: str = MODEL_URI, replicas: int = 1, **engine: Any) -> Object:
    """A small CPU service: enough context for the tests, little memory, no GPU, rolls that do not watch for long.

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

    return wait_for(f"{name} Ready with {serving} serving", check, timeout_s=READY_S, story=kube.story)


def client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, **options)


def wait_routed(url: str, name: str) -> None:
    """Until the gateway lists the model and one request is answered."""

    def check() -> bool:
        reply = httpx.post(f"{url}/v1/completions", json={"model": name, "prompt": "Hi", "max_tokens": 1}, timeout=60)
        return reply.status_code == 200

    wait_for(f"the gateway answering for {name}", check, timeout_s=60)


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
    url: str, model: str, *, streams: int = 2, max_tokens: int = 24, pause_s: float = 0.0
) -> Iterator[Traffic]:
    """Clients that stream one answer after another, with a pause between two, until the block ends; every failure is
    kept with its time."""
    traffic, stop, started = Traffic(), threading.Event(), time.monotonic()

    async def stream_until_stopped(api: openai.AsyncOpenAI) -> None:
        while not stop.is_set():
            try:
                finish = None
                answer = await api.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": QUESTION}], stream=True,
                    max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True},
                )  # fmt: skip
                async for chunk in answer:
                    finish = chunk.choices[0].finish_reason or finish if chunk.choices else finish
                if finish is None:
                    raise RuntimeError("the stream ended without a finish reason")
                traffic.completed += 1
                await asyncio.sleep(pause_s)
            except Exception as error:
                traffic.failures.append(f"{time.monotonic() - started:.1f} s: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    async def run() -> None:
        api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        async with api:
            await asyncio.gather(*(stream_until_stopped(api) for _ in range(streams)))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        wait_for(
            "the first streams to complete", lambda: traffic.completed >= streams or traffic.failures, timeout_s=60
        )
        yield traffic
    finally:
        stop.set()
        thread.join(timeout=90)
