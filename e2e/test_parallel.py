"""One model over three ranks of a pod (tensor parallelism): it answers, and rolls without a failed request."""

from __future__ import annotations

from e2e.kube import Kube, Object, wait_for
from e2e.services import QUESTION, client, pods, service, steady_traffic, wait_ready, wait_routed

RANKS = 3
"""SmolLM2 has nine heads and three of keys and values."""


def parallel(**engine: int) -> Object:
    found = service("parallel", tensorParallelSize=RANKS)
    found["spec"]["engine"] |= engine
    found["spec"]["resources"]["limits"] = {"memory": "8Gi"}
    return found


def test_three_ranks_answer_and_roll(kube: Kube, gateway_url: str) -> None:
    kube.apply(parallel())
    try:
        wait_ready(kube, "parallel")
        wait_routed(gateway_url, "parallel")
        (old,) = pods(kube, "parallel")
        with client(gateway_url) as api:
            answer = api.chat.completions.create(
                model="parallel", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=16
            )
        assert "Paris" in (answer.choices[0].message.content or "")
        with steady_traffic(gateway_url, "parallel", streams=1, max_tokens=8) as traffic:
            kube.apply(parallel(maxNumSeqs=12))
            wait_ready(kube, "parallel")
            wait_for("only the new revision's pod", lambda: [p["metadata"]["uid"] for p in pods(kube, "parallel")] !=
                     [old["metadata"]["uid"]] and len(pods(kube, "parallel")) == 1, timeout_s=60,
                     story=kube.story)  # fmt: skip
            after = traffic.completed
            wait_for("an answer of the new revision", lambda: traffic.completed > after, timeout_s=60)
        assert traffic.failures == []
        assert traffic.completed > 1
    finally:
        kube.delete("mis", "parallel", wait=False)
