"""An engine pod is killed in the middle of fifty streams: all complete, with the texts of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from e2e.kube import HANG_S, Kube, Object
from e2e.services import known_to_gateways, pods, service, wait_ready, wait_routed

STREAMS = 50
TOPICS = ("the sea", "the sky", "a dog", "a city", "the moon", "a river", "bread", "music", "winter", "a train")
ASK = {"model": "lasting", "temperature": 0, "max_tokens": 40, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def lasting(kube: Kube, gateway_url: str) -> Iterator[list[Object]]:
    kube.apply(service("lasting", replicas=2, maxNumSeqs=32, kvCache={"blocks": 512}))
    wait_ready(kube, "lasting", serving=2)
    wait_routed(gateway_url, "lasting")
    yield pods(kube, "lasting")
    kube.delete("mis", "lasting")


def processes(pod: Object) -> list[int]:
    """The pod's processes, as this machine sees them: by its UID in the names of their cgroups."""
    uid = pod["metadata"]["uid"]
    names = (uid, uid.replace("-", "_"))
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            text = entry.read_text()
        except OSError:  # it has just ended
            continue
        if any(name in text for name in names):
            found.append(int(entry.parent.name))
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


async def stream(api: openai.AsyncOpenAI, topic: str, begun: asyncio.Semaphore) -> tuple[str, str | None, int]:
    """Text, finish reason, and how many identities the answer had."""
    messages = [{"role": "user", "content": f"Tell me about {topic}."}]
    text, finish, ids = "", None, set[str]()
    async for chunk in await api.chat.completions.create(messages=messages, **ASK):
        if not ids:
            begun.release()
        ids.add(chunk.id)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish, len(ids)


async def test_a_pod_killed_in_the_middle_of_fifty_streams(kube: Kube, gateway_url: str, lasting) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0, timeout=HANG_S) as api:
        begun = asyncio.Semaphore(0)
        wanted = dict(zip(TOPICS, await asyncio.gather(*(stream(api, t, begun) for t in TOPICS)), strict=True))
        topics = [TOPICS[n % len(TOPICS)] for n in range(STREAMS)]
        victims = processes(lasting[0])
        assert victims, "the pod has no process"
        begun = asyncio.Semaphore(0)
        running = [asyncio.create_task(stream(api, topic, begun)) for topic in topics]
        async with asyncio.timeout(HANG_S):
            for _ in range(STREAMS // 4):
                await begun.acquire()
        send(victims, signal.SIGSTOP)  # it stays in the middle of its streams, however long it takes to look
        try:
            doors = [gateway["admission"] for gateway in await asyncio.to_thread(known_to_gateways, kube, "lasting")]
            under_way = sum(not task.done() for task in running)
        finally:
            send(victims, signal.SIGKILL)
        answers = await asyncio.gather(*running)
    assert under_way > STREAMS // 4, "they were to be killed in the middle"
    assert sum(door["waiting"] for door in doors) == 0, f"the engines have room for all at once: {doors}"
    for topic, answer in zip(topics, answers, strict=True):
        assert answer == wanted[topic]
    assert all(finish == "length" and ids == 1 for _, finish, ids in answers)
