"""What to tell: conditions with stable reasons from spec, observation and decision (pure). Conforms to kstatus.

Ready says whether requests are answered, by whichever revision. ModelLoaded is about the newest revision, and carries
the engine's own words when it could not start. Reconciling and Stalled are there only while they are True.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from mainsail_operator import objects
from mainsail_operator.fetched import Fetch
from mainsail_operator.objects import Owner, revision_of
from mainsail_operator.observe import INVALID_ADAPTER, Observed, Revision, Trouble
from mainsail_operator.rollout import Decision
from mainsail_operator.settings import Settings
from mainsail_operator.types import (
    Condition,
    InferenceServiceSpec,
    InferenceServiceStatus,
    RevisionStatus,
    RolloutStatus,
)

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition before it has a time."""

    type: str
    status: Truth
    reason: str
    message: str


def status(
    owner: Owner, spec: InferenceServiceSpec, generation: int, observed: Observed, decision: Decision,
    old: Sequence[Condition], now: float, *, settings: Settings, refusal: str = "", paused: bool = False,
    fetch: Fetch | None = None, lacking: tuple[str, str] | None = None,
) -> InferenceServiceStatus:  # fmt: skip
    """The status after this pass. old: the conditions that are there, whose times stay where nothing changed.

    refusal: what the API server said when it last refused a write for this service. paused: nothing is written.
    lacking: reason and message of what this cluster has not, and the newest revision needs.

    fetch: how far the model is, where it is fetched."""
    view = _View(spec, observed, decision.status, observed.revision(revision_of(spec)), fetch, lacking)
    findings = [
        _ready(view),
        *_model_fetched(fetch),
        _model_loaded(view),
        *_adapters_loaded(view),
        _rollout_complete(view),
        *_movement(view, refusal, paused),
    ]
    return InferenceServiceStatus(
        observed_generation=generation,
        url=objects.url(owner, settings),
        replicas=sum(len(revision.alive) for revision in observed.revisions),
        serving_replicas=view.serving,
        selector=objects.selector(owner),
        revisions=[
            RevisionStatus(
                name=revision.name, replicas=len(revision.alive), serving=revision.serving,
                weight=decision.weights.get(revision.name, 0),
            )
            for revision in observed.revisions
        ],
        rollout=decision.status,
        conditions=[timed(finding, generation, old, now) for finding in findings],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _View:
    """What the conditions are about."""

    spec: InferenceServiceSpec
    observed: Observed
    rollout: RolloutStatus
    target: Revision | None
    """The newest revision, if its Deployment is there."""
    fetch: Fetch | None = None
    lacking: tuple[str, str] | None = None

    @property
    def unfetched(self) -> Fetch | None:
        """What the newest revision waits for."""
        return self.fetch if self.fetch and not self.fetch.done and not (self.target and self.target.serving) else None

    @property
    def serving(self) -> int:
        return sum(revision.serving for revision in self.observed.revisions)

    @property
    def trouble(self) -> Trouble | None:
        return _trouble(self.target)


def _trouble(revision: Revision | None) -> Trouble | None:
    """What keeps a revision from serving; pods that cannot even be made included."""
    if revision is None:
        return None
    if revision.trouble is None and revision.refusal and not revision.alive:
        return Trouble("PodsRefused", f"the API server refuses its pods: {revision.refusal}")
    return revision.trouble


def invalid(
    owner: Owner, generation: int, message: str, before: InferenceServiceStatus, now: float, settings: Settings
) -> InferenceServiceStatus:
    """The status of an object that this operator cannot read: nothing is touched, and the condition says why."""
    findings = (
        Finding("Ready", "Unknown", "InvalidSpec", "The spec cannot be read; what runs is left as it is."),
        Finding("Stalled", "True", "InvalidSpec", message[:2000]),
    )
    conditions = [timed(finding, generation, before.conditions, now) for finding in findings]
    return before.model_copy(update={"observed_generation": generation, "url": objects.url(owner, settings),
                                     "selector": objects.selector(owner), "conditions": conditions})  # fmt: skip


def timed(finding: Finding, generation: int, old: Sequence[Condition], now: float) -> Condition:
    known = next((c for c in old if c.type == finding.type and c.status == finding.status), None)
    since = known.last_transition_time if known else datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Condition(
        type=finding.type, status=finding.status, reason=finding.reason, message=finding.message[:2000],
        observed_generation=generation, last_transition_time=since,
    )  # fmt: skip


def _ready(view: _View) -> Finding:
    if view.serving:
        told = "1 replica answers" if view.serving == 1 else f"{view.serving} replicas answer"
        return Finding("Ready", "True", "Serving", f"{told} requests.")
    if view.spec.replicas == 0:
        return Finding("Ready", "True", "ScaledToZero", "No replica is wanted, and none serves.")
    if view.trouble:
        return Finding("Ready", "False", view.trouble.reason, view.trouble.message)
    if view.lacking:
        return Finding("Ready", "False", *view.lacking)
    if view.unfetched:
        return Finding("Ready", "False", *_unfetched(view.unfetched))
    return Finding("Ready", "False", "Starting", "No replica answers requests yet.")


def _unfetched(fetch: Fetch) -> tuple[str, str]:
    return ("FetchingModel" if fetch.state != "Failed" else fetch.reason), fetch.message


def _model_fetched(fetch: Fetch | None) -> list[Finding]:
    """Only for models that are fetched."""
    if fetch is None:
        return []
    return [Finding("ModelFetched", "True" if fetch.done else "False", fetch.reason, fetch.message)]


_AFTER_LOADING = frozenset({"GateFailed", "Inconclusive", "RolledBackByHand", "CrashLoop"})


def _model_loaded(view: _View) -> Finding:
    rollout, trouble, name = view.rollout, view.trouble, view.rollout.target
    if view.target is not None and view.target.serving:
        return Finding("ModelLoaded", "True", "Loaded", f"Revision {name} has loaded its model.")
    if rollout.phase in ("RollingBack", "RolledBack"):
        if rollout.reason in _AFTER_LOADING:
            return Finding("ModelLoaded", "True", "Loaded", f"Revision {name} had loaded its model.")
        unsure = rollout.reason == "ProgressDeadlineExceeded"
        return Finding("ModelLoaded", "Unknown" if unsure else "False", rollout.reason, rollout.message)
    if trouble:
        return Finding("ModelLoaded", "False" if trouble.load_failure else "Unknown", trouble.reason, trouble.message)
    if view.spec.replicas == 0:
        return Finding("ModelLoaded", "Unknown", "ScaledToZero", "spec.replicas is 0.")
    return Finding("ModelLoaded", "Unknown", "Loading", "The newest revision has not loaded its model yet.")


def _adapters_loaded(view: _View) -> list[Finding]:
    """Only with adapters. A single pod that cannot get one is told, also beside others that could."""
    if not view.spec.adapters:
        return []
    kind, rollout, name = "AdaptersLoaded", view.rollout, view.rollout.target
    for pod in view.target.alive if view.target else ():
        if pod.trouble is not None and pod.trouble.adapter:
            return [Finding(kind, "False", pod.trouble.reason, f"pod {pod.name}: {pod.trouble.message}")]
    if view.target is not None and view.target.serving:
        return [Finding(kind, "True", "Loaded", f"Revision {name} serves {len(view.spec.adapters)} adapters.")]
    if rollout.reason == INVALID_ADAPTER:
        return [Finding(kind, "False", rollout.reason, rollout.message)]
    return [Finding(kind, "Unknown", "Loading", "The newest revision does not serve yet.")]


def _complete(view: _View) -> bool:
    target = view.target
    alone = all(revision is target for revision in view.observed.revisions)
    settled = target is not None and target.serving == len(target.alive) == target.replicas == view.spec.replicas
    return view.rollout.phase == "Complete" and alone and settled


def _rollout_complete(view: _View) -> Finding:
    if _complete(view):
        return Finding("RolloutComplete", "True", "Complete", "All replicas are of the newest revision and serve.")
    return Finding("RolloutComplete", "False", *_progress(view))


def _progress(view: _View) -> tuple[str, str]:
    """Reason and message of a service that is not settled."""
    if view.rollout.phase == "Complete":
        serving = view.target.serving if view.target else 0
        return "Progressing", f"{serving} of {view.spec.replicas} replicas serve.{_missing(view)}"
    serving = view.target.serving if view.target else 0
    message = view.rollout.message or f"{serving} of {view.spec.replicas} replicas of the newest revision serve."
    if view.rollout.phase == "RollingBack":
        return "RollingBack", message
    return view.rollout.reason or view.rollout.phase, message


def _missing(view: _View) -> str:
    """Why there are no more replicas, where somebody says so: of a service that grew, no rollout tells it."""
    if view.target is None or view.target.serving >= view.spec.replicas:
        return ""
    if view.target.refusal and len(view.target.alive) < view.target.replicas:
        return f" The API server refuses further pods: {view.target.refusal}"
    return f" {view.trouble.reason}: {view.trouble.message}" if view.trouble else ""


def _movement(view: _View, refusal: str, paused: bool) -> list[Finding]:
    """Reconciling, or Stalled, or neither."""
    if paused:
        return [Finding("Reconciling", "True", "Paused", f"The annotation {objects.PAUSED} stops all writes.")]
    if refusal:
        return [Finding("Stalled", "True", "WriteRefused", refusal)]
    if view.lacking:
        return [Finding("Stalled", "True", *view.lacking)]
    if _complete(view):
        return []
    rollout, target, trouble = view.rollout, view.target, view.trouble
    if rollout.phase in ("RolledBack", "Stalled"):
        return [Finding("Stalled", "True", rollout.reason, rollout.message)]
    if view.unfetched and view.unfetched.state == "Failed":
        return [
            Finding("Stalled", "True", view.unfetched.reason, f"The model is not fetched: {view.unfetched.message}")
        ]
    if view.unfetched:
        return [Finding("Reconciling", "True", *_unfetched(view.unfetched))]
    if target and trouble and trouble.adapter and not target.serving:
        return [Finding("Stalled", "True", trouble.reason, f"Revision {target.name} cannot start: {trouble.message}")]
    hopeless = trouble is not None and (trouble.load_failure or trouble.reason == "PodsRefused")
    alone = rollout.phase == "Complete" or not rollout.stable
    if target and trouble and hopeless and alone and not target.serving:
        return [Finding("Stalled", "True", trouble.reason, f"Revision {target.name} cannot start: {trouble.message}")]
    return [Finding("Reconciling", "True", *_progress(view))]
