"""What engines say of their load reaches the balancer."""

import asyncio

import pytest

from mainsail_gateway.fleet import Fleet
from mainsail_gateway.scrape import Reading, Scraper, read

EXPOSITION = b"""# HELP vllm:num_requests_running Requests in the running batch.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1.0
mainsail:sessions_kv_kept_blocks{engine="0",model_name="m"} 7.0
mainsail:max_num_seqs{engine="0",model_name="m"} 32.0
mainsail:max_num_seqs{engine="1",model_name="m"} 32.0
"""


def test_engines_behind_one_address_add_up():
    assert read(EXPOSITION) == Reading(
        running=5, waiting=4, kv_usage=0.5, kv_tokens=1600, kept_tokens=112, max_running=64
    )


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"go_goroutines 3\n", b"vllm:num_requests_running x\n"])
def test_anything_else_is_no_reading(text):
    assert read(text) is None


async def test_endpoints_are_read_and_broken_ones_harm_nobody(kit):
    async def metrics(up, seen, reader, writer):
        assert seen.head.startswith(b"GET /metrics ")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(EXPOSITION) + EXPOSITION)

    good, cut = await kit.upstream(metrics), await kit.upstream(kit.raw(b"HTTP/1.1 200 OK\r\n"))
    fleet = Fleet()
    fleet.update(kit.table(kit.service(good.endpoint("good"), cut.endpoint("cut"))), 0.0)
    loads = fleet.pools["default", "m"].loads
    rounds: list[float] = []
    running = asyncio.create_task(Scraper(fleet, 0.01, rounds.append).run())
    await kit.until(lambda: len(good.seen) > 1 and len(cut.seen) > 1)
    running.cancel()
    assert rounds
    assert loads[good.endpoint("good").key].max_running == 64
    assert loads[good.endpoint("good").key].kv_tokens == 1600
    assert loads[good.endpoint("good").key].others > 0
    assert loads[good.endpoint("good").key].resident == 1600 // 2 + 112, "what requests hold, and what is kept"
    assert loads[cut.endpoint("cut").key].kv_tokens == 0
