"""spec.rollout and spec.drain: how a change reaches the pods, and how a replica ends; where a rollout stands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from mainsail_operator.types.schema import (
    JSON,
    DrainTimeout,
    Model,
    ProgressDeadline,
    check_duration,
    duration_field,
    rule,
    rules,
)

Hold = Annotated[str, AfterValidator(check_duration), duration_field("24h")]


def _ratio(text: str) -> JSON:
    return rules(rule("self >= 1.0", f"{text} compares with the old revision: at least 1, for example 1.5"))


class DrainSpec(Model):
    """How a replica ends."""

    timeout: DrainTimeout = Field(
        default="120s",
        description="How long a replica that is to end may finish its running requests, as 90s, 2m30s or 1h. After it, "
        "the rest is cut off. The pod's grace period is always above it, so the node never kills a drain midway.",
    )


class RolloutStep(Model):
    """One stage of a canary."""

    weight: int = Field(
        ge=1,
        le=99,
        description="Percent of the requests that the new revision gets in this step. It gets that share of the "
        "replicas too, rounded up, beside all of the old ones where there is room for them.",
    )
    hold: Hold = Field(
        default="2m",
        description="How long this step lasts at least, as 90s, 2m30s or 1h. The gate judges all of it.",
    )


class RolloutGate(Model):
    """What a new revision must show before it gets more of the requests, judged on its worst pod."""

    min_requests: int = Field(
        default=50,
        ge=1,
        le=1_000_000,
        description="Requests that the new revision must have answered in a step before it can pass. Fewer are "
        "inconclusive (but enough errors fail it early).",
    )
    max_error_rate: float = Field(
        default=0.01,
        description="Largest share of its requests that may fail by the fault of a pod (status 500 and above, broken "
        "answers; retries that hid it from the client included), 0 to 1.",
        json_schema_extra=rules(
            rule("self >= 0.0 && self < 1.0", "maxErrorRate is a share: from 0 to below 1, for example 0.01")
        ),
    )
    max_time_to_first_token_ratio: float = Field(
        default=1.5,
        description="How many times longer the time to the first token (90th percentile) may be than the old "
        "revision's in the same time.",
        json_schema_extra=_ratio("maxTimeToFirstTokenRatio"),
    )
    max_inter_token_ratio: float = Field(
        default=1.3,
        description="The same for the time between tokens.",
        json_schema_extra=_ratio("maxInterTokenRatio"),
    )
    on_inconclusive: Literal["Hold", "Proceed", "Rollback"] = Field(
        default="Hold",
        description="What to do when there are too few requests to judge by. Hold waits for as long as it takes and "
        "says for what. Proceed and Rollback decide so when rollout.progressDeadline has passed since the step began.",
    )


class RolloutSpec(Model):
    """How a change of the spec reaches the pods."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.steps) || self.steps.size() == 0 || self.strategy == 'Canary'",
                "steps belong to strategy Canary: set strategy: Canary or remove them",
                path=".steps",
            ),
            rule(
                "!has(self.steps) || self.steps.map(step, step.weight).isSorted()",
                "the weights of steps must grow: a later step cannot give the new revision less",
                path=".steps",
            ),
        )
    )

    strategy: Literal["RollingUpdate", "Canary", "BlueGreen"] = Field(
        default="RollingUpdate",
        description="RollingUpdate replaces replicas as new ones have proven themselves for minReady. Canary gives the "
        "new revision a share of the "
        "requests, step by step, each behind the gate. BlueGreen starts all of the new revision beside the old one, "
        "moves the requests at once, and keeps the old one until the gate has passed. RollingUpdate goes on as long as "
        "new pods do not fail more of their requests than gate.maxErrorRate. Every strategy rolls back by "
        "itself when the new revision cannot load, keeps crashing or makes no progress.",
    )
    gpu_policy: Literal["Auto", "Surge", "DrainFirst"] = Field(
        default="Auto",
        description="Where new replicas get their GPUs from. Surge: free ones only, so the rollout waits for room (and "
        "rolls back at the deadline). DrainFirst: an old replica ends before each new one starts, so no GPU is needed "
        "besides, and one replica is missing meanwhile. Auto: Surge while the scheduler finds room, else DrainFirst, "
        "and the condition says so; it never waits for room that does not come.",
    )
    steps: list[RolloutStep] = Field(
        default_factory=list[RolloutStep],
        max_length=16,
        description="Stages of a canary, in order. Default for Canary: 10 % for 2m, then 50 % for 5m.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    hold: Hold = Field(
        default="2m",
        description="BlueGreen: how long the new revision has all the requests before the old one ends. A rollback "
        "until then is immediate.",
    )
    min_ready: Hold = Field(
        default="20s",
        description="RollingUpdate: how long a new replica must serve, and not fail its requests, before it replaces "
        "an old one. Where there are requests, and it has not answered gate.minRequests of them by then, it is watched "
        "for up to three times as long. 0s: a new replica replaces an old one as soon as it serves, and a revision "
        "that fails its requests may have taken over before that shows.",
    )
    gate: RolloutGate = Field(
        default_factory=RolloutGate,
        description="What a new revision must show (Canary and BlueGreen; of RollingUpdate, maxErrorRate alone, and "
        "minRequests of each new replica).",
    )
    progress_deadline: ProgressDeadline = Field(
        default="15m",
        description="How long a new revision may go without any progress (a pod placed, a pod that serves) before it "
        "is given up, as 90s, 15m or 1h. Longer than the longest load of a model on a cold node. The old revision "
        "serves on meanwhile.",
    )
    auto_rollback: bool = Field(
        default=True,
        description="Go back to the old revision when the new one fails. false: stop where it is and say why "
        "(Stalled), for a person to decide.",
    )


Phase = Literal["Starting", "Gating", "Promoting", "Complete", "RollingBack", "RolledBack", "Stalled"]


class RolloutStatus(Model):
    """Where the change from one revision to the next stands. The next operator goes on from here."""

    phase: Phase = Field(
        description="Starting: pods of the target are placed, load, and prove that they serve (the first one, in a "
        "RollingUpdate, for minReady). Gating: it gets a share "
        "of the requests and is judged. Promoting: it has passed; it takes over and the others drain. Complete. "
        "RollingBack, RolledBack: the target has failed or was taken back, and the stable revision takes over, or has. "
        "Stalled: the target has failed and nothing older serves, or autoRollback is off.",
    )
    step: int = Field(default=0, description="The step of the gate, from 1; 0 when there is none.")
    stable: str = Field(default="", description="The revision that had all the requests before, and gets them back.")
    target: str = Field(default="", description="The revision that the spec asks for.")
    since: str = Field(
        default="",
        description="When this phase or step began, in RFC 3339; the gate judges what came after it. A RollingUpdate "
        "is judged from its start on, so Promoting has the time of Starting there.",
    )
    reason: str = Field(default="", description="Why it stands there, in one stable word.")
    message: str = Field(default="", description="Why, for people: what it waits for, or what failed.")
    drain_first: bool = Field(
        default=False,
        description="There is no room for replicas of the target beside the old ones (or gpuPolicy forbids it): they "
        "are replaced one at a time.",
    )
    command: str = Field(
        default="",
        description="The value of the annotation mainsail.dev/rollout that was carried out last, so that it is carried "
        "out once.",
    )
