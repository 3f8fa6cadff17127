"""One model over three ranks of a pod (tensor parallelism): it answers, rolls without a failure, and loses a rank."""

from __future__ import annotations

import os
import signal

from e2e import processes
from e2e.kube import Kube, Object, wait_for
from e2e.services import QUESTION, client, pods, service, steady_traffic, wait_ready, wait_routed

RANKS = 3
"""SmolLM2 has nine heads and three of keys and values."""


def parallel(**engine: int) -> Object:
    found = service("parallel", tensorParallelSize=RANKS)
    found["spec"]["engine"] |= engine
    found["spec"]["resources"]["limits"] = {"memory": "8Gi"}
    return found


def answer(gateway_url: str) -> str:
    with client(gateway_url) as api:
        found = api.chat.completions.create(
            model="parallel", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=16
        )
    return found.choices[0].message.content or ""


def _outlives_a_rank(kube: Kube, gateway_url: str) -> None:
    """A rank that is killed ends its engine, which says why; the kubelet starts it again in the same pod."""
    (before,) = pods(kube, "parallel")
    os.kill(processes.of_pod(before, "mainsail_engine.runner.tp_worker")[0], signal.SIGKILL)

    def started_again() -> Object | None:
        (pod,) = pods(kube, "parallel")
        (container,) = pod["status"]["containerStatuses"]
        return container if container["restartCount"] == 1 and container["ready"] else None

    container = wait_for("the engine to serve again", started_again, story=kube.story)
    assert "RankLost" in container["lastState"]["terminated"]["message"]
    assert container["lastState"]["terminated"]["exitCode"] == 1
    wait_routed(gateway_url, "parallel")
    assert "Paris" in answer(gateway_url)


def test_three_ranks_answer_and_roll(kube: Kube, gateway_url: str) -> None:
    kube.apply(parallel())
    try:
        wait_ready(kube, "parallel")
        wait_routed(gateway_url, "parallel")
        (old,) = pods(kube, "parallel")
        assert "Paris" in answer(gateway_url)
        with steady_traffic(gateway_url, "parallel", streams=1, max_tokens=8) as traffic:
            kube.apply(parallel(maxNumSeqs=12))
            wait_ready(kube, "parallel")
            wait_for("only the new revision's pod", lambda: [p["metadata"]["uid"] for p in pods(kube, "parallel")] !=
                     [old["metadata"]["uid"]] and len(pods(kube, "parallel")) == 1,
                     story=kube.story)  # fmt: skip
            after = traffic.completed
            wait_for("an answer of the new revision", lambda: traffic.completed > after)
        assert traffic.failures == []
        assert traffic.completed > 1
        _outlives_a_rank(kube, gateway_url)
    finally:
        kube.delete("mis", "parallel", wait=False)
