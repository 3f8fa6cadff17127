"""An engine pod is killed in the middle of fifty streams: all complete, with the texts of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from e2e.kube import HANG_S, Kube, Object
from e2e.services import known_to_gateways, pods, service, wait_ready, wait_routed

STREAMS = 50
TOPICS = ("the sea", "the sky", "a dog", "a city", "the moon", "a river", "bread", "music", "winter", "a train")
ASK = {"model": "lasting", "temperature": 0, "max_tokens": 96, "stream": True, "extra_body": {"ignore_eos": True}}


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


@dataclass
class Heard:
    """What has come of all streams together."""

    begun: int = 0
    ended: int = 0
    chunks: int = 0

    @property
    def under_way(self) -> int:
        return self.begun - self.ended


async def stream(api: openai.AsyncOpenAI, topic: str, heard: Heard) -> tuple[str, str | None, int]:
    """Text, finish reason, and how many identities the answer had."""
    messages = [{"role": "user", "content": f"Tell me about {topic}."}]
    text, finish, ids = "", None, set[str]()
    async for chunk in await api.chat.completions.create(messages=messages, **ASK):
        heard.begun += not ids
        heard.chunks += 1
        ids.add(chunk.id)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    heard.ended += 1
    return text, finish, len(ids)


def spell(pids: list[int]) -> None:
    """They run for a moment, and stand still. In a thread: a loop that has much to read lets nobody sleep briefly."""
    send(pids, signal.SIGCONT)
    time.sleep(0.1)
    send(pids, signal.SIGSTOP)


async def silence(heard: Heard) -> None:
    """Until nothing more comes."""
    seen = -1
    while seen != heard.chunks:
        seen = heard.chunks
        await asyncio.sleep(0.3)


async def all_sent(kube: Kube) -> list[Object]:
    """What the gateways know of the service, once all streams are at an engine, or wait to be."""
    while True:
        told = await asyncio.to_thread(known_to_gateways, kube, "lasting")
        waiting = sum(one["admission"]["waiting"] for one in told)
        if waiting + sum(one["requests"] for one in endpoints(told)) == STREAMS:
            return told


def endpoints(told: list[Object]) -> list[Object]:
    return [endpoint for one in told for endpoint in one["endpoints"]]


async def test_a_pod_killed_in_the_middle_of_fifty_streams(kube: Kube, gateway_url: str, lasting) -> None:
    """It is the pod with most of them. Once the other's have ended, it runs in short spells, and rests until all that
    it said is heard: so it is killed in the middle of its streams, however slow those are who listen."""
    pids = {pod["metadata"]["name"]: processes(pod) for pod in lasting}
    assert all(pids.values()), "a pod has no process"
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0, timeout=HANG_S) as api:
        wanted = dict(zip(TOPICS, await asyncio.gather(*(stream(api, t, Heard()) for t in TOPICS)), strict=True))
        topics, heard, sent = [TOPICS[n % len(TOPICS)] for n in range(STREAMS)], Heard(), Counter[str]()
        try:
            for group in pids.values():
                send(group, signal.SIGSTOP)
            running = [asyncio.create_task(stream(api, topic, heard)) for topic in topics]
            async with asyncio.timeout(HANG_S):
                told = await all_sent(kube)
                for endpoint in endpoints(told):
                    sent[endpoint["pod"]] += endpoint["requests"]
                victim = max(sent, key=sent.__getitem__)
                victims, rest = pids.pop(victim), STREAMS - sent[victim]
                for group in pids.values():
                    send(group, signal.SIGCONT)
                while heard.ended < rest:
                    await silence(heard)
                while heard.under_way <= STREAMS // 4:
                    assert heard.ended < STREAMS, "they were to be killed in the middle"
                    await asyncio.to_thread(spell, victims)
                    await silence(heard)
            send(victims, signal.SIGKILL)
        finally:
            for group in pids.values():
                send(group, signal.SIGCONT)
        answers = await asyncio.gather(*running)
    doors = [one["admission"] for one in told]
    assert sum(door["waiting"] for door in doors) == 0, f"the engines have room for all at once: {doors}"
    for topic, answer in zip(topics, answers, strict=True):
        assert answer == wanted[topic]
    assert all(finish == "length" and ids == 1 for _, finish, ids in answers)
