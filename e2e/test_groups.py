"""One replica over two pods (pipeline parallelism), with the real LeaderWorkerSet controller: from the condition that
there is none to an answer, a lost worker, another revision."""

from __future__ import annotations

from typing import Any

import pytest

from e2e import leader_worker_sets
from e2e.cluster.place import Place
from e2e.kube import Kube, Object, condition, wait_for
from e2e.services import QUESTION, client, pods, service, wait_ready, wait_routed

pytestmark = pytest.mark.slow
"""The controller is a Go build of some minutes, once on a machine."""
NAME = "staged"


def staged(**engine: Any) -> Object:
    return service(NAME, pipelineParallelSize=2, **engine)


def workers(kube: Kube) -> dict[str, Object]:
    """By UID, those that are not ending."""
    found = kube.list("pods", selector=f"mainsail.dev/worker-of={NAME}")
    return {pod["metadata"]["uid"]: pod for pod in found if "deletionTimestamp" not in pod["metadata"]}


def answer(gateway_url: str) -> str:
    with client(gateway_url) as api:
        found = api.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=16
        )
    return found.choices[0].message.content or ""


def test_two_pods_are_one_replica(cluster: Place, kube: Kube, gateway_url: str) -> None:
    kube.apply(staged())
    try:
        told = wait_for("what is missing", lambda: (c := condition(kube.get("mis", NAME), "Stalled")).get("reason") ==
                        "LeaderWorkerSetsMissing" and c, story=kube.story)  # fmt: skip
        assert "install LWS" in told["message"]
        assert pods(kube, NAME) == []
        with leader_worker_sets.installed(cluster, kube):
            try:
                _serves_over_two_pods(kube, gateway_url)
            finally:
                kube.delete("mis", NAME)
                wait_for("nothing left", lambda: not kube.list("leaderworkersets") and not workers(kube))
    finally:
        kube.delete("mis", NAME, wait=False)


def _serves_over_two_pods(kube: Kube, gateway_url: str) -> None:
    wait_ready(kube, NAME)
    wait_routed(gateway_url, NAME)
    assert "Paris" in answer(gateway_url)
    (leader,), (worker,) = pods(kube, NAME), workers(kube).values()
    flags = leader["spec"]["containers"][0]["args"]
    assert flags[flags.index("--nnodes") + 1] == "$(LWS_GROUP_SIZE)"
    (piece,) = kube.list("endpointslices", selector=f"mainsail.dev/service={NAME}")
    assert [one["targetRef"]["uid"] for one in piece["endpoints"]] == [leader["metadata"]["uid"]]
    _outlives_a_worker(kube, gateway_url, worker)
    kube.apply(staged(maxNumSeqs=12))
    wait_for("only the new revision", lambda: leader["metadata"]["uid"] not in
             {pod["metadata"]["uid"] for pod in pods(kube, NAME)}, story=kube.story)  # fmt: skip
    wait_ready(kube, NAME)
    assert "Paris" in answer(gateway_url)


def _outlives_a_worker(kube: Kube, gateway_url: str, worker: Object) -> None:
    kube.run("delete", "pod", worker["metadata"]["name"], "--grace-period=0", "--force")
    wait_for("the loss to be noticed", lambda: kube.get("mis", NAME)["status"]["servingReplicas"] == 0,
             story=kube.story)  # fmt: skip
    wait_ready(kube, NAME)
    assert set(workers(kube)).isdisjoint({worker["metadata"]["uid"]})
    assert "Paris" in answer(gateway_url)
