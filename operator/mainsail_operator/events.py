"""Kubernetes events about a service: few, and only what a person would want to have been told (pure).

One for each turn of a rollout, each command that does nothing, each change of the number of replicas that the load
asked for, each model that was fetched or cannot be, each refusal of a write, and each stop; nothing for what the
conditions show anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mainsail_operator.rollout import COMMAND, verb
from mainsail_operator.types import Condition, InferenceServiceStatus, RolloutStatus, ScalingStatus


@dataclass(frozen=True, slots=True)
class Event:
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def events(before: InferenceServiceStatus, after: InferenceServiceStatus) -> list[Event]:
    """What the change from one status to the next is worth telling."""
    turns = before.rollout, after.rollout
    told = (_turn(*turns), _in_vain(*turns), _refusal(before, after), _fetch(before, after))
    found = [event for event in told if event] + _scaling(before.scaling, after.scaling)
    old, new = before.rollout, after.rollout
    if new is not None and new.drain_first and not (old is not None and old.drain_first):
        found.append(Event("Normal", "DrainFirst", "No room beside the old replicas: they are replaced one at a time."))
    return found


def _turn(old: RolloutStatus | None, new: RolloutStatus | None) -> Event | None:
    if new is None or (old is not None and (old.phase, old.step, old.target) == (new.phase, new.step, new.target)):
        return None
    match new.phase:
        case "Starting" if new.step > 1:
            return Event("Normal", "RolloutStep", f"{new.target} is past step {new.step - 1}.")
        case "Starting":
            beside = f" beside {new.stable}" if new.stable else ""
            return Event("Normal", "RolloutStarted", f"Starting {new.target}{beside}.")
        case "Gating":
            return Event("Normal", "RolloutGating", f"{new.target} serves and is judged: {new.message}")
        case "Promoting":
            return Event("Normal", "RolloutPromoting", f"{new.target} takes over. {new.message}".strip())
        case "Complete":
            return Event("Normal", "RolloutComplete", f"{new.target} serves alone.")
        case "RollingBack":
            return Event("Warning", "RolloutFailed", f"Back to {new.stable}. {new.message}")
        case "RolledBack":
            return Event("Normal", "RolledBack", f"{new.stable} serves alone again.")
        case _:
            return Event("Warning", "RolloutStalled", new.message)


def _in_vain(old: RolloutStatus | None, new: RolloutStatus | None) -> Event | None:
    """A command that was read and changed nothing: misspelt, or of no use where the rollout stands."""
    if old is None or new is None or new.command == old.command or verb(new.command) in ("", "pause", "resume"):
        return None
    if (old.phase, old.step, old.target, old.since) != (new.phase, new.step, new.target, new.since):
        return None
    words = f"The annotation {COMMAND}: {new.command[:64]} does nothing while the rollout is {new.phase}."
    return Event("Warning", "CommandIgnored", f"{words} There are pause, promote, rollback and retry.")


def _scaling(old: ScalingStatus | None, new: ScalingStatus | None) -> list[Event]:
    """The number changed, or something keeps it from growing."""
    if new is None or old is None or "Replicas" in (old.reason, new.reason):
        return []
    found: list[Event] = []
    if new.desired != old.desired:
        found.append(Event("Normal", "Scaled", f"{new.reason}: {new.message}"))
    if new.limited_by and new.limited_by != old.limited_by:
        limit = "no node has GPUs for more" if new.limited_by == "GPUs" else "spec.scaling.max is reached"
        found.append(
            Event("Warning", "ScalingLimited", f"The load asks for more than {new.desired} replicas: {limit}.")
        )
    return found


def _fetch(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Event | None:
    """The model has been fetched, or cannot be for a reason that is new."""

    def told(status: InferenceServiceStatus) -> Condition | None:
        return next((c for c in status.conditions if c.type == "ModelFetched"), None)

    old, new = told(before), told(after)
    if new is None or (old is not None and (old.status, old.reason) == (new.status, new.reason)):
        return None
    if new.status == "True":
        return Event("Normal", "ModelFetched", new.message)
    under_way = new.reason in ("Fetching", "Waiting")
    return None if under_way else Event("Warning", "FetchFailed", f"{new.reason}: {new.message}")


def _refusal(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Event | None:
    def refused(status: InferenceServiceStatus) -> str:
        return next((c.message for c in status.conditions if c.reason == "WriteRefused"), "")

    message = refused(after)
    return Event("Warning", "WriteRefused", message) if message and message != refused(before) else None
