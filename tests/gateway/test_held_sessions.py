"""More agents than two small real replicas have KV for: turns are held, all complete, the autoscaler sees the need."""

from __future__ import annotations

import asyncio
import random
import time

import httpx
from prometheus_client import generate_latest

from mainsail_gateway.kv_events import Listener
from mainsail_gateway.scrape import Scraper
from mainsail_operator.autoscale import Decision, Fleet, Memory, autoscale
from mainsail_operator.exposition import parse
from mainsail_operator.signals import DEMAND, History, Signals, is_engine_signal, pod_load, waiting
from mainsail_operator.types import ScalingSpec

CHAT = "/v1/chat/completions"
SESSIONS, TURNS = 24, 3
NOTHING_ELSE = {"queueDepth": 1000, "kvUsage": 1, "preemptionsPerMinute": 1000}
"""Targets that only what sessions want together can reach."""


async def agent(client: httpx.AsyncClient, number: int) -> list[str]:
    """A conversation without any id: each turn repeats all before it, and a tool takes a moment in between."""
    rng, messages, answers = random.Random(number), [], []
    for turn in range(TURNS):
        said = "".join(rng.choices("abcdefgh ", k=1300 if turn == 0 else 150))
        messages.append({"role": "user", "content": said})
        body = {"model": "smol", "messages": messages, "max_tokens": 24, "ignore_eos": True, "temperature": 0}
        answer = await client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["choices"][0]["message"]["content"] or "")
        messages.append({"role": "assistant", "content": answers[-1]})
        await asyncio.sleep(0.05)
    return answers


async def decide(gw, pages: list[str]) -> Decision:
    """What the operator makes of the gateway's and the engines' metrics."""
    now, signals, loads = time.time(), Signals(), []
    told = generate_latest(gw.gateway.metrics.registry).decode()
    signals.queued("gateway", now, waiting(parse(told, DEMAND.__contains__)))
    for name, page in enumerate(pages):
        history = History()
        for ago in (15.0, 10.0, 5.0, 0.0):
            history.add(now - ago, dict(parse(page, is_engine_signal)))
        loads.append(pod_load(str(name), history, now))
    spec = ScalingSpec.model_validate({"max": 8, "targets": NOTHING_ELSE})
    return autoscale(spec, Fleet(loads, queue=signals.queue("default", "smol", now)), Memory(2), now)


async def test_held_sessions_all_complete_and_are_demand(kit, small_engines) -> None:
    async with kit.gateway(kit.service(*small_engines, name="smol")) as gw:
        parts = [Scraper(gw.gateway.fleet, 0.2, gw.gateway.heard), Listener(gw.gateway.fleet)]
        tasks = [asyncio.create_task(part.run()) for part in parts]
        pool = gw.gateway.fleet.pools["default", "smol"]
        await kit.until(lambda: all(load.kv_tokens == 4800 for load in pool.loads.values()))
        async with httpx.AsyncClient(base_url=gw.url, timeout=120) as client:
            idle = [(await client.get(f"http://127.0.0.1:{end.port}/metrics")).text for end in small_engines]
            assert (await decide(gw, idle)).desired == 2, "nobody is held: nothing to grow for"
            agents = [asyncio.create_task(agent(client, number)) for number in range(SESSIONS)]
            await kit.until(lambda: gw.metric("mainsail:gateway_held_sessions", service="smol") >= 4)
            decision = await decide(gw, idle)
            answers = await asyncio.gather(*agents)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [len(turns) for turns in answers] == [TURNS] * SESSIONS
        assert gw.metric("mainsail:gateway_held_sessions", service="smol") == 0
        assert decision.reason == "HeldSessions"
        assert decision.desired > 2, decision.message
