"""Two nodes, one pipeline stage on each, started apart: over HTTP they answer what one process does, and end together.

The nodes are two commands on this machine that meet over TCP on the loopback, the second told where by what a
LeaderWorkerSet puts into its environment.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.engine.processes import has_ended
from tests.engine.server.conftest import Engine, launch, start, wait_for
from tests.engine.server.test_ranks import mixed, texts
from tests.ports import free_ports

ARGUMENTS = (
    "--pipeline-parallel-size", "2", "--kv-cache-blocks", "40", "--max-model-len", "512", "--max-num-seqs", "16",
    "--kv-offloading-size", "0.02", "--max-num-batched-tokens", "48",
)  # fmt: skip


@dataclass
class Nodes:
    leader: Engine
    worker: Engine
    health: str
    """The worker's."""

    def probe(self, path: str) -> int:
        return httpx.get(f"{self.health}{path}", timeout=240).status_code

    def close(self) -> None:
        self.leader.close()
        self.worker.close()


def start_worker(folder: Path, model: Path, port: int, *arguments: str) -> tuple[Engine, str]:
    """The second node, as a pod of a LeaderWorkerSet: (the command, where its health is)."""
    folder.mkdir()
    (health,) = free_ports(1)
    told = {"LWS_LEADER_ADDRESS": "127.0.0.1", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        worker = launch(
            folder, "--model", str(model), "--served-model-name", "smol", "other", "--dtype", "float32",
            "--master-port", str(port), "--health-port", str(health), *arguments,
        )  # fmt: skip
    return worker, f"http://127.0.0.1:{health}"


def start_nodes(folder: Path, model: Path) -> Nodes:
    (port,) = free_ports(1)
    worker, health = start_worker(folder / "worker", model, port, *ARGUMENTS)
    leader = start(folder, model, "--nnodes", "2", "--master-port", str(port), *ARGUMENTS)
    return Nodes(leader, worker, health)


@pytest.fixture(scope="module")
def nodes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A pool for four or five of the requests below, and host memory for all."""
    running = start_nodes(tmp_path_factory.mktemp("nodes"), tiny_model)
    yield running
    running.close()


def test_a_worker_node_answers_probes_and_nothing_else(nodes: Nodes) -> None:
    assert [nodes.probe(f"/health/{name}") for name in ("live", "startup", "ready")] == [200, 200, 200]
    assert nodes.probe("/v1/models") == 404
    listening = {
        c.laddr.port for c in psutil.Process(nodes.worker.process.pid).net_connections() if c.status == "LISTEN"
    }
    assert listening == {int(nodes.health.rpartition(":")[2])}
    assert "node 1 of 2: ranks 1 follow 127.0.0.1" in nodes.worker.log.read_text()


def test_preempted_chunked_and_swapped_as_one_process_with_room(nodes: Nodes, tiny_engine: Engine) -> None:
    assert texts(nodes.leader, mixed(6)) == texts(tiny_engine, mixed(6))
    assert nodes.leader.metric("vllm:num_preemptions_total") > 0
    assert nodes.leader.metric("mainsail:swapped_in_blocks_total") > 0
    assert nodes.leader.metric("mainsail:recomputed_tokens_total") == 0


def test_structured_output_and_every_parameter_are_those_of_one_process(nodes: Nodes, tiny_engine: Engine) -> None:
    """Masks and parameters reach the last stage; requests with and without share micro-batches."""
    forms = [
        {"regex": "[A-Z][a-z]{2,5} [0-9]{4}"},
        {"json": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}},
    ]
    bodies: list[dict[str, Any]] = [
        {"prompt": "Where?", "temperature": temperature, "seed": 3, "ignore_eos": False, "structured_outputs": form}
        for form in forms
        for temperature in (0.0, 1.0)
    ]
    bodies += [
        {"prompt": "free", "temperature": 0, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"prompt": "free", "temperature": 0, "repetition_penalty": 1.2, "logit_bias": {"66": 2.5}, "stop": ["zz"]},
        {"prompt": "free", "temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.02, "seed": 11},
        {"prompt": "free", "temperature": 0, "min_tokens": 20, "ignore_eos": False, "bad_words": ["e", "th"]},
    ]
    assert texts(nodes.leader, bodies) == texts(tiny_engine, bodies)


def test_log_probabilities_of_prompt_and_answer(nodes: Nodes, tiny_engine: Engine) -> None:
    body = {"prompt": "a long enough prompt " * 4, "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": True}
    ours, theirs = (
        engine.post("/v1/completions", model="smol", **body).json()["choices"][0]["logprobs"]
        for engine in (nodes.leader, tiny_engine)
    )
    assert ours["tokens"] == theirs["tokens"]
    assert ours["token_logprobs"][1:] == pytest.approx(theirs["token_logprobs"][1:], abs=1e-3)


def test_embeddings_come_from_the_last_stage(nodes: Nodes, tiny_engine: Engine) -> None:
    body = {"model": "smol", "input": ["some words to embed " * 5]}
    ours, theirs = (
        engine.post("/v1/embeddings", **body).json()["data"][0]["embedding"] for engine in (nodes.leader, tiny_engine)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_asleep_and_awake_again(nodes: Nodes, tiny_engine: Engine) -> None:
    assert nodes.leader.post("/sleep").json() == {"is_sleeping": True}
    assert nodes.leader.post("/wake_up").json() == {"is_sleeping": False}
    assert texts(nodes.leader, mixed(3)) == texts(tiny_engine, mixed(3))


# -- the end: what follows takes the nodes down -----------------------------------------------------------------------


def rank_of(worker: Engine) -> psutil.Process:
    (rank,) = psutil.Process(worker.process.pid).children()
    return rank


def check_lost(nodes: Nodes, lose: Callable[[], None]) -> None:
    """In the middle of answers, of which there is no end: all end with an error, and both nodes end non-zero."""

    def answer(number: int) -> int:
        """The first status that is not 200; 0 for a connection that breaks."""
        body = {"model": "smol", "prompt": f"{number}", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        with contextlib.suppress(httpx.TransportError):
            while (status := nodes.leader.post("/v1/completions", **body).status_code) == 200:
                pass
            return status
        return 0

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(answer, number) for number in range(16)]
        wait_for(lambda: nodes.leader.metric("vllm:num_requests_running") > 8, "requests to run")
        lose()
        statuses = {request.result() for request in asked}
    assert statuses <= {0, 503}
    assert nodes.leader.wait() != 0
    assert nodes.worker.wait() != 0


def reason(engine: Engine) -> str:
    return json.loads(engine.termination_log.read_text())["reason"]


def test_a_stopped_rank_on_the_other_node_ends_the_engine_on_both(nodes: Nodes) -> None:
    rank = rank_of(nodes.worker)
    check_lost(nodes, rank.suspend)
    wait_for(lambda: has_ended(rank), "the stopped rank to be ended")
    assert (reason(nodes.leader), reason(nodes.worker)) in (("RankLost", "LeaderLost"), ("RankLost", "RankLost"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill a rank", "kill the node", "kill the leader", "stop the leader"])
def test_whatever_is_lost_both_nodes_end(what: str, tiny_model: Path, tmp_path: Path) -> None:
    nodes = start_nodes(tmp_path, tiny_model)
    core = psutil.Process(nodes.leader.core_pid())
    lose = {
        "kill a rank": rank_of(nodes.worker).kill, "kill the node": nodes.worker.process.kill,
        "kill the leader": core.kill, "stop the leader": core.suspend,
    }[what]  # fmt: skip
    try:
        if what != "stop the leader":
            check_lost(nodes, lose)
            return
        lose()  # its API process is liveness' to notice
        assert nodes.worker.wait() != 0
        assert reason(nodes.worker) == "LeaderLost"
    finally:
        core.kill() if core.is_running() else None
        nodes.close()


@pytest.mark.slow
def test_told_to_stop_the_worker_stays_until_the_leader_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    nodes = start_nodes(tmp_path, tiny_model)
    try:
        nodes.worker.process.send_signal(signal.SIGTERM)
        assert nodes.leader.post("/v1/completions", model="smol", prompt="x", max_tokens=4).status_code == 200
        assert nodes.probe("/health/live") == 200
        nodes.leader.terminate()
        assert (nodes.leader.wait(), nodes.worker.wait()) == (0, 0)
    finally:
        nodes.close()


@pytest.mark.slow
def test_nodes_that_were_started_otherwise_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    others = (*ARGUMENTS[:-1], "32")
    worker, _ = start_worker(tmp_path / "worker", tiny_model, port, *others)
    leader = launch(
        tmp_path, "--model", str(tiny_model), "--dtype", "float32", "--nnodes", "2", "--master-port", str(port),
        *ARGUMENTS,
    )  # fmt: skip
    try:
        assert worker.wait() == 1
        assert "not started like the leader: scheduler differ" in worker.termination_log.read_text()
    finally:
        leader.close()
        worker.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nnodes", "3", "--pipeline-parallel-size", "4"), "--nnodes 3 does not divide .* these do: 1, 2, 4"),
        (("--nnodes", "2"), "--nnodes 2 does not divide .* or set --pipeline-parallel-size to a multiple of 2"),
        (("--nnodes", "2", "--node-rank", "2", "-pp", "2"), "--node-rank must be from 0 to 1"),
        (("--headless",), "--headless: node 0 serves the API"),
        (("-pp", "2", "--speculative-config", '{"method": "ngram"}'), "--speculative-config does not work with --pipe"),
        (("-pp", "2", "--nnodes", "2", "--enable-lora"), "--enable-lora does not work with --nnodes above 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    arguments: tuple[str, ...], says: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    from mainsail_engine.cli import main

    with pytest.raises(SystemExit):
        main(["serve", "--model", str(tiny_model), *arguments])
    assert re.search(says, capsys.readouterr().err)
