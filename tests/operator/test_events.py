"""Events about scaling and fetching: one for each change, none for figures that move."""

from __future__ import annotations

from typing import Literal

import pytest

from mainsail_operator.events import events
from mainsail_operator.types import Condition, InferenceServiceStatus, Phase, RolloutStatus, ScalingStatus


def scaling(
    desired: int, reason: str = "QueueDepth", limited: Literal["", "GPUs", "max"] = ""
) -> InferenceServiceStatus:
    told = ScalingStatus(desired=desired, reason=reason, message="1 → 2: 6 requests wait", limited_by=limited)
    return InferenceServiceStatus(scaling=told)


def fetched(status: Literal["True", "False"], reason: str, message: str = "words") -> InferenceServiceStatus:
    one = Condition(type="ModelFetched", status=status, reason=reason, message=message, observed_generation=1,
                    last_transition_time="2026-01-01T00:00:00Z")  # fmt: skip
    return InferenceServiceStatus(conditions=[one])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (scaling(1), scaling(2), [("Normal", "Scaled")]),
        (scaling(2), scaling(2), []),
        (scaling(2), scaling(2, limited="GPUs"), [("Warning", "ScalingLimited")]),
        (scaling(2, limited="GPUs"), scaling(2, limited="GPUs"), []),
        (scaling(2, limited="GPUs"), scaling(2), []),
        (scaling(1, "Replicas"), scaling(2, "Replicas"), []),
        (InferenceServiceStatus(), scaling(1), []),
        (fetched("False", "Fetching"), fetched("True", "Fetched"), [("Normal", "ModelFetched")]),
        (fetched("False", "Fetching", "5 %"), fetched("False", "Fetching", "10 %"), []),
        (InferenceServiceStatus(), fetched("False", "Waiting"), []),
        (fetched("False", "Fetching"), fetched("False", "DiskFull"), [("Warning", "FetchFailed")]),
        (fetched("False", "DiskFull"), fetched("False", "DiskFull"), []),
    ],
)
def test_events(before, after, expected) -> None:
    assert [(event.kind, event.reason) for event in events(before, after)] == expected


@pytest.mark.parametrize(
    ("command", "phase", "told"),
    [("abort", "Gating", True), ("rollback@2", "Complete", True), ("pause", "Starting", False), ("", "Gating", False)],
)
def test_a_command_that_does_nothing_is_told_once(command: str, phase: Phase, told: bool) -> None:
    before = RolloutStatus(phase=phase, target="demo-1", stable="demo-0", since="2026-01-01T00:00:00Z", command="retry")
    after = InferenceServiceStatus(rollout=before.model_copy(update={"command": command}))
    found = events(InferenceServiceStatus(rollout=before), after)
    assert [event.reason for event in found] == (["CommandIgnored"] if told else [])
    assert events(after, after) == []
    if told:
        assert command in found[0].message
    assert after.rollout is not None
    acted = after.rollout.model_copy(update={"phase": "Promoting", "since": "2026-01-01T00:01:00Z"})
    assert "CommandIgnored" not in [e.reason for e in events(after, InferenceServiceStatus(rollout=acted))]


def test_the_event_says_why() -> None:
    (event,) = events(scaling(1), scaling(2))
    assert event.message == "QueueDepth: 1 → 2: 6 requests wait"
