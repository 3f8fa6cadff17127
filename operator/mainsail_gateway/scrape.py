"""What engines say of their load: their own metrics, read every few seconds, for the balancer.

The names are vLLM's, which every engine of this kind exports. What cannot be read is simply not known: a gateway then
goes by its own requests, as it does between two readings. Endpoints are asked side by side; a slow one delays nobody.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from mainsail_gateway.fleet import Fleet
from mainsail_gateway.routes import Endpoint

log = logging.getLogger(__name__)

TIMEOUT_S = 1.5
AT_ONCE = 32
_VALUE = re.compile(
    rb"^(vllm:num_requests_running|vllm:num_requests_waiting|vllm:kv_cache_usage_perc|mainsail:sessions_kv_kept_blocks"
    rb"|mainsail:max_num_seqs)(?:\{[^}]*\})? (\S+)$",
    re.MULTILINE,
)
_POOL = re.compile(rb"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
_LABEL = re.compile(rb'(block_size|num_gpu_blocks)="([0-9]+)"')


@dataclass(frozen=True, slots=True)
class Reading:
    """One engine's load; of several engines behind one address, their sum and the fullest pool."""

    running: int
    waiting: int
    kv_usage: float
    """0 … 1."""
    kv_tokens: int
    """What its KV pool holds; 0: it does not say."""
    kept_tokens: int = 0
    """Of it, what is kept for sessions between turns."""
    max_running: int = 0
    """Requests that run at once; 0: it does not say."""


def read(text: bytes) -> Reading | None:
    """A reading from an exposition; None when it is no engine's."""
    values: dict[bytes, list[float]] = {}
    try:
        for name, value in _VALUE.findall(text):
            values.setdefault(name, []).append(float(value))
    except ValueError:
        return None
    if b"vllm:num_requests_running" not in values:
        return None
    pools = [dict(_LABEL.findall(labels)) for labels in _POOL.findall(text)]
    return Reading(
        running=int(sum(values[b"vllm:num_requests_running"])),
        waiting=int(sum(values.get(b"vllm:num_requests_waiting", [0.0]))),
        kv_usage=max(values.get(b"vllm:kv_cache_usage_perc", [0.0])),
        kv_tokens=sum(int(p.get(b"block_size", 0)) * int(p.get(b"num_gpu_blocks", 0)) for p in pools),
        kept_tokens=int(sum(values.get(b"mainsail:sessions_kv_kept_blocks", [0.0])))
        * max((int(p.get(b"block_size", 0)) for p in pools), default=0),
        max_running=int(sum(values.get(b"mainsail:max_num_seqs", [0.0]))),
    )


class Scraper:
    """Reads every endpoint of the fleet, again and again, and at once when there are new ones."""

    def __init__(self, fleet: Fleet, interval_s: float, heard: Callable[[float], None]) -> None:
        """heard: told the time after each round."""
        self._fleet = fleet
        self._interval_s = interval_s
        self._heard = heard
        self.wanted = asyncio.Event()
        """Set when there are endpoints that have not been asked yet."""
        self._places = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Until cancelled."""
        async with httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            while True:
                self.wanted.clear()
                endpoints = {e.key: e for pool in self._fleet.pools.values() for e in pool.endpoints.values()}
                await asyncio.gather(*(self._one(client, endpoint) for endpoint in endpoints.values()))
                self._heard(time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self.wanted.wait()

    async def _one(self, client: httpx2.AsyncClient, endpoint: Endpoint) -> None:
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        try:
            async with self._places:
                response = await client.get(f"http://{host}:{endpoint.port}/metrics")
        except (httpx2.HTTPError, OSError) as error:
            log.debug("metrics of %s: %s", endpoint.pod, error)
            return
        reading = read(response.content) if response.status_code == 200 else None
        if reading is None:
            return
        now = time.monotonic()
        for pool in self._fleet.pools.values():
            pool.observe(
                endpoint.key,
                running=reading.running,
                waiting=reading.waiting,
                kv_usage=reading.kv_usage,
                kv_tokens=reading.kv_tokens,
                kept_tokens=reading.kept_tokens,
                max_running=reading.max_running,
                now=now,
            )
