"""spec.rollout and spec.drain: how a change reaches the pods, and how a replica ends."""

from __future__ import annotations

from pydantic import Field

from mainsail_operator.types.schema import DrainTimeout, Model, ProgressDeadline


class DrainSpec(Model):
    """How a replica ends."""

    timeout: DrainTimeout = Field(
        default="120s",
        description="How long a replica that is to end may finish its running requests, as 90s, 2m30s or 1h. After it, "
        "the rest is cut off. The pod's grace period is always above it, so the node never kills a drain midway.",
    )


class RolloutSpec(Model):
    """How a change of the spec reaches the pods."""

    progress_deadline: ProgressDeadline = Field(
        default="15m",
        description="How long a new revision may go without any progress before Stalled says so, as 90s, 15m or 1h. "
        "Longer than the longest load of a model on a cold node. The old revision serves on meanwhile.",
    )
