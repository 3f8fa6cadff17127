"""Two ranks over gloo do what one does: structured output, host memory for KV, sleep."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.engine.server.conftest import Engine, start

COMMON = {"model": "smol", "ignore_eos": True, "max_tokens": 60}


@pytest.fixture(scope="module")
def ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A pool for four or five of the requests below, and host memory for all."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = ("--tensor-parallel-size", "2", "--kv-cache-blocks", "40", "--max-model-len", "512")
    running = start(folder, tiny_model, *arguments, "--max-num-seqs", "16", "--kv-offloading-size", "0.02")
    yield running
    running.close()


def texts(engine: Engine, bodies: list[dict[str, Any]]) -> list[list[str]]:
    """Answers to requests that are sent at once."""

    def text(body: dict[str, Any]) -> list[str]:
        response = engine.post("/v1/completions", **COMMON | body)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(text, bodies))


def mixed(count: int) -> list[dict[str, Any]]:
    """Greedy and seeded, so many of each, prompts of 60 to 70 tokens. Those of a kind come in one request: they run
    beside one another however slowly the client sends."""
    prompts = [f"{n:02d}" * 30 + "x" * n for n in range(2 * count)]
    return [
        {"prompt": prompts[kind::2], "temperature": float(kind), "seed": kind, "cache_salt": str(kind)}
        for kind in range(2)
    ]


def test_structured_output_is_that_of_one_rank(ranks: Engine, tiny_engine: Engine) -> None:
    forms = [
        {"regex": "[A-Z][a-z]{2,5} [0-9]{4}"},
        {"choice": ["left", "right", "straight on"]},
        {"json": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}},
    ]
    bodies = [
        {"prompt": "Where?", "temperature": temperature, "seed": 3, "ignore_eos": False, "structured_outputs": form}
        for form in forms
        for temperature in (0.0, 1.0)
    ]
    assert texts(ranks, bodies) == texts(tiny_engine, bodies)


def test_preempted_to_host_memory_and_back_is_as_one_rank_with_room(ranks: Engine, tiny_engine: Engine) -> None:
    assert texts(ranks, mixed(6)) == texts(tiny_engine, mixed(6))
    assert ranks.metric("vllm:num_preemptions_total") > 0
    assert ranks.metric("mainsail:swapped_in_blocks_total") > 0
    assert ranks.metric("mainsail:recomputed_tokens_total") == 0


def test_asleep_and_awake_again(ranks: Engine, tiny_engine: Engine) -> None:
    assert ranks.post("/sleep").json() == {"is_sleeping": True}
    assert ranks.post("/v1/completions", **COMMON, prompt="x").json()["error"]["code"] == "asleep"
    assert ranks.post("/wake_up").json() == {"is_sleeping": False}
    before = ranks.metric("mainsail:swapped_in_blocks_total")
    assert texts(ranks, mixed(6)) == texts(tiny_engine, mixed(6))
    assert ranks.metric("mainsail:swapped_in_blocks_total") > before
