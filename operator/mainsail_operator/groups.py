"""Replicas of several pods (`engine.pipelineParallelSize`): LeaderWorkerSets, as they are made (pure).

    one replica  =  one group  =  a leader  +  workers, each with a stage of the model and its own GPUs
                                  │            no requests of their own
                                  └─ serves, is counted, is scraped, drains: what the one pod is for other services

A LeaderWorkerSet (sigs.k8s.io/lws) takes the Deployment's place: one for each revision, of which only the number of
replicas is written later. Its controller tells each pod the leader's address, the group's size and its own place, by
which the engine's ranks meet. Containers are started again one by one (restart policy None): an engine whose ranks have
lost one another ends on every node, so they meet anew, and its last words and its restarts stay in sight.

Workers carry another label than leaders, so that nothing that selects a service's pods (its endpoints, its selector for
autoscalers) takes them for replicas. `observe` joins the two again.
"""

from __future__ import annotations

from mainsail_operator import objects
from mainsail_operator.objects import GROUP_KIND, SERVICE_LABEL, WORKER_LABEL, Owner
from mainsail_operator.settings import Settings
from mainsail_operator.types import JSON, InferenceServiceSpec

API = "/apis/leaderworkerset.x-k8s.io/v1"
PLURAL = "leaderworkersets"
MISSING = (
    "LeaderWorkerSetsMissing",
    "engine.pipelineParallelSize needs pods that work as one, and this cluster has no LeaderWorkerSet API: install LWS "
    "(sigs.k8s.io/lws), which the operator notices by itself, or set pipelineParallelSize to 1.",
)
"""Reason and message of a service that cannot run without it."""


def workload(owner: Owner, spec: InferenceServiceSpec, replicas: int, settings: Settings) -> JSON:
    """What runs the pods of the spec's revision, as it is made; later only its replicas change."""
    if not objects.is_grouped(spec):
        return objects.deployment(owner, spec, replicas, settings)
    leader = objects.template(owner, spec, settings)
    labels: dict[str, str] = dict(leader["metadata"]["labels"])
    del labels[SERVICE_LABEL]
    worker = {**leader, "metadata": {**leader["metadata"], "labels": labels | {WORKER_LABEL: owner.name}}}
    group = {
        "size": spec.engine.pipeline_parallel_size, "restartPolicy": "None",
        "leaderTemplate": leader, "workerTemplate": worker,
    }  # fmt: skip
    return objects.stamped(
        {
            "apiVersion": API.removeprefix("/apis/"),
            "kind": GROUP_KIND,
            "metadata": objects.workload_metadata(owner, spec),
            "spec": {"replicas": replicas, "startupPolicy": "LeaderCreated", "leaderWorkerTemplate": group},
        }
    )
