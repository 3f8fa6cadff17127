"""Kubernetes events about a service: few, and only what a person would want to have been told (pure).

One for each turn of a rollout, each refusal of a write, and each stop; nothing for what the conditions show anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mainsail_operator.types import InferenceServiceStatus, RolloutStatus


@dataclass(frozen=True, slots=True)
class Event:
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def events(before: InferenceServiceStatus, after: InferenceServiceStatus) -> list[Event]:
    """What the change from one status to the next is worth telling."""
    found = [event for event in (_turn(before.rollout, after.rollout), _refusal(before, after)) if event]
    old, new = before.rollout, after.rollout
    if new is not None and new.drain_first and not (old is not None and old.drain_first):
        found.append(Event("Normal", "DrainFirst", "No room beside the old replicas: they are replaced one at a time."))
    return found


def _turn(old: RolloutStatus | None, new: RolloutStatus | None) -> Event | None:
    if new is None or (old is not None and (old.phase, old.step, old.target) == (new.phase, new.step, new.target)):
        return None
    match new.phase:
        case "Starting" if new.step > 1:
            return Event("Normal", "RolloutStep", f"{new.target} has passed step {new.step - 1}.")
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


def _refusal(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Event | None:
    def refused(status: InferenceServiceStatus) -> str:
        return next((c.message for c in status.conditions if c.reason == "WriteRefused"), "")

    message = refused(after)
    return Event("Warning", "WriteRefused", message) if message and message != refused(before) else None
