"""What to tell: conditions with stable reasons from spec, observation and plan (pure). Conforms to kstatus.

Ready says whether requests are answered, by whichever revision. ModelLoaded is about the newest revision, and carries
the engine's own words when it could not start. Reconciling and Stalled are there only while they are True.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from mainsail_operator import objects
from mainsail_operator.objects import Owner, revision_of
from mainsail_operator.observe import Observed, Revision
from mainsail_operator.plan import Plan
from mainsail_operator.types import Condition, InferenceServiceSpec, InferenceServiceStatus, RevisionStatus

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition before it has a time."""

    type: str
    status: Truth
    reason: str
    message: str


def status(
    owner: Owner, spec: InferenceServiceSpec, generation: int, observed: Observed, plan: Plan,
    old: Sequence[Condition], now: float,
) -> InferenceServiceStatus:  # fmt: skip
    """The status after this pass. old: the conditions that are there, whose times stay where nothing changed."""
    target = observed.revision(revision_of(spec))
    serving = sum(revision.serving for revision in observed.revisions)
    findings = [
        _ready(spec, serving, target),
        _model_loaded(spec, target),
        _rollout_complete(spec, target, observed),
        *_movement(spec, target, observed, plan),
    ]
    return InferenceServiceStatus(
        observed_generation=generation,
        url=objects.url(owner),
        replicas=sum(len(revision.alive) for revision in observed.revisions),
        serving_replicas=serving,
        selector=objects.selector(owner),
        revisions=_revisions(observed, serving),
        conditions=[timed(finding, generation, old, now) for finding in findings],
    )


def invalid(
    owner: Owner, generation: int, message: str, old: Sequence[Condition], now: float
) -> InferenceServiceStatus:
    """The status of an object that this operator cannot read: nothing is touched, and the condition says why."""
    findings = (
        Finding("Ready", "Unknown", "InvalidSpec", "The spec cannot be read; what runs is left as it is."),
        Finding("Stalled", "True", "InvalidSpec", message[:2000]),
    )
    return InferenceServiceStatus(
        observed_generation=generation,
        url=objects.url(owner),
        selector=objects.selector(owner),
        conditions=[timed(finding, generation, old, now) for finding in findings],
    )


def timed(finding: Finding, generation: int, old: Sequence[Condition], now: float) -> Condition:
    known = next((c for c in old if c.type == finding.type and c.status == finding.status), None)
    since = known.last_transition_time if known else datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Condition(
        type=finding.type, status=finding.status, reason=finding.reason, message=finding.message[:2000],
        observed_generation=generation, last_transition_time=since,
    )  # fmt: skip


def _revisions(observed: Observed, serving: int) -> list[RevisionStatus]:
    """Weights are the shares of the requests that the endpoints get: each serving pod the same."""
    found: list[RevisionStatus] = []
    left = 100
    rest = serving
    for revision in observed.revisions:
        weight = round(left * revision.serving / rest) if rest else 0
        left, rest = left - weight, rest - revision.serving
        found.append(
            RevisionStatus(name=revision.name, replicas=len(revision.alive), serving=revision.serving, weight=weight)
        )
    return found


def _ready(spec: InferenceServiceSpec, serving: int, target: Revision | None) -> Finding:
    if serving:
        return Finding("Ready", "True", "Serving", f"{serving} replicas answer requests.")
    if spec.replicas == 0:
        return Finding("Ready", "False", "ScaledToZero", "spec.replicas is 0.")
    trouble = target.trouble if target else None
    if trouble:
        return Finding("Ready", "False", trouble.reason, trouble.message)
    return Finding("Ready", "False", "Starting", "No replica answers requests yet.")


def _model_loaded(spec: InferenceServiceSpec, target: Revision | None) -> Finding:
    if target is not None and target.serving:
        return Finding("ModelLoaded", "True", "Loaded", f"Revision {target.name} has loaded its model.")
    trouble = target.trouble if target else None
    if trouble and trouble.load_failure:
        return Finding("ModelLoaded", "False", trouble.reason, trouble.message)
    if trouble:
        return Finding("ModelLoaded", "Unknown", trouble.reason, trouble.message)
    if spec.replicas == 0:
        return Finding("ModelLoaded", "Unknown", "ScaledToZero", "spec.replicas is 0.")
    return Finding("ModelLoaded", "Unknown", "Loading", "The newest revision has not loaded its model yet.")


def _complete(spec: InferenceServiceSpec, target: Revision | None, observed: Observed) -> bool:
    alone = all(revision is target for revision in observed.revisions)
    return target is not None and alone and target.serving == len(target.alive) == spec.replicas


def _rollout_complete(spec: InferenceServiceSpec, target: Revision | None, observed: Observed) -> Finding:
    if _complete(spec, target, observed):
        return Finding("RolloutComplete", "True", "Complete", "All replicas are of the newest revision and serve.")
    serving = target.serving if target else 0
    return Finding(
        "RolloutComplete",
        "False",
        "Progressing",
        f"{serving} of {spec.replicas} replicas of the newest revision serve.",
    )


def _movement(spec: InferenceServiceSpec, target: Revision | None, observed: Observed, plan: Plan) -> list[Finding]:
    """Reconciling, or Stalled, or neither."""
    if _complete(spec, target, observed) and not plan.actions:
        return []
    trouble = target.trouble if target else None
    if target and trouble and trouble.load_failure and not target.serving:
        return [Finding("Stalled", "True", trouble.reason, f"Revision {target.name} cannot start: {trouble.message}")]
    if target and target.deadline_exceeded and not _complete(spec, target, observed):
        more = f": {trouble.message}" if trouble else "."
        return [
            Finding("Stalled", "True", "ProgressDeadlineExceeded", f"Revision {target.name} makes no progress{more}")
        ]
    if plan.drain_first:
        message = "No node has room for a new replica beside the old ones: they are replaced one at a time."
        return [Finding("Reconciling", "True", "DrainFirst", message)]
    done = target.serving if target else 0
    return [
        Finding(
            "Reconciling", "True", "Progressing", f"{done} of {spec.replicas} replicas of the newest revision serve."
        )
    ]
