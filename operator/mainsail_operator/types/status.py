"""What the operator answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mainsail_operator.types.rollout import RolloutStatus
from mainsail_operator.types.schema import Model


class RevisionStatus(Model):
    """One revision that has pods."""

    name: str = Field(description="The revision's Deployment.")
    replicas: int = Field(description="Pods of it that exist and are not ending.")
    serving: int = Field(description="Pods of it that answer requests.")
    weight: int = Field(
        description="Share of the requests that it gets. The weights add up to 100, or are all 0 while nothing serves. "
        "The gateway routes by them; a revision of weight 0 gets no request while another one serves."
    )


class Capacity(Model):
    """What one replica carried when it was full: the measure of whether fewer replicas would do."""

    requests_per_second: float = Field(description="Finished requests per second of one full replica.")
    tokens_per_second: float = Field(description="Generated tokens per second of one full replica.")


class ScalingStatus(Model):
    """How many replicas the service should have, and why that many."""

    desired: int = Field(default=1, description="Replicas that the service should have now.")
    reason: str = Field(
        default="",
        max_length=64,
        description="Why the number last changed, in one stable word: QueueDepth, KvUsage, Preemptions, "
        "TimeToFirstToken, HeldSessions and HeldRequests made it grow; LowLoad, NoRoom and Idle made it shrink; "
        "Bounds: scaling.min or max moved; Woken: by annotation. Replicas: spec.replicas is the number.",
    )
    message: str = Field(default="", max_length=512, description="The same with the numbers that it was decided on.")
    limited_by: Literal["", "GPUs", "max"] = Field(
        default="", description="What keeps the service from growing as the load asks for; empty: nothing does."
    )
    last_scale_time: str | None = Field(
        default=None, description="When the number last changed.", json_schema_extra={"format": "date-time"}
    )
    idle_since: str | None = Field(
        default=None,
        description="Since when nothing was asked, where scaling.min is 0.",
        json_schema_extra={"format": "date-time"},
    )
    capacity: Capacity | None = Field(
        default=None, description="What one replica carried when it was full; unknown until one was."
    )


class Condition(Model):
    """One aspect of the service's state, with a stable reason to build on and a message to read."""

    type: str = Field(
        max_length=64,
        description="Ready: it answers requests. ModelFetched (only for hf://, s3:// and oci:// models): the model's "
        "files are there; else how far they are, or why not. ModelLoaded: the newest revision has loaded its model. "
        "AdaptersLoaded (only with spec.adapters): and its adapters; else which one is missing or refused, and why. "
        "RolloutComplete: only the newest revision is left and all its replicas serve. ScalingActive (only with "
        "spec.scaling): the load decides the number of replicas; False: it cannot be seen. Reconciling (only while "
        "True): work is under way. Stalled (only while True): it will not proceed without a change.",
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=128, description="Why, in one stable word.")
    message: str = Field(max_length=2048, description="Why, for people: what is wrong, where, and what to do.")
    observed_generation: int = Field(description="The metadata.generation that this was decided on.")
    last_transition_time: str = Field(
        description="When the status last changed.", json_schema_extra={"format": "date-time"}
    )


class InferenceServiceStatus(Model):
    """What the operator last saw. Conforms to kstatus: `observedGeneration`, Reconciling, Stalled."""

    observed_generation: int = Field(
        default=0, description="The metadata.generation that this status is about; older means not looked at yet."
    )
    url: str = Field(default="", description="Base URL of the OpenAI API in the cluster, for this service alone.")
    replicas: int = Field(default=0, description="Pods of all revisions that exist and are not ending.")
    serving_replicas: int = Field(default=0, description="Pods of all revisions that answer requests.")
    selector: str = Field(default="", description="Label selector of the pods, for the scale subresource.")
    revisions: list[RevisionStatus] = Field(
        default_factory=list[RevisionStatus],
        description="Revisions with pods, the newest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    rollout: RolloutStatus | None = Field(
        default=None, description="Where the change from one revision to the next stands."
    )
    scaling: ScalingStatus | None = Field(default=None, description="How many replicas, and why that many.")
    conditions: list[Condition] = Field(
        default_factory=list[Condition],
        description="The aspects of its state; `type` says which there are.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
