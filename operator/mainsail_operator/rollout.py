"""The rollout: from one revision to the next, behind proof. A pure state machine; its state is `status.rollout`.

                          ┌──────────── next step ───────────┐
                          ▼                                  │ passed
    spec changed ──▶ Starting ── all of the step serve ──▶ Gating ── last step passed ──▶ Promoting ──▶ Complete
                          │                                  │                                │
                          └──── cannot load, crashes, no progress, gate failed, by hand ──────┘
                                                             ▼
                                          RollingBack ──▶ RolledBack        (nothing older: Stalled)

The order of proof is scheduled → loaded → serves (has generated a token and is an endpoint of the gateway) → share of
the requests → enough of them → errors and times within the gate → next step. RollingUpdate has no steps to wait in:
each new pod has to serve for `minReady`, in the eyes of the gateways and with requests where there are any, before an
old one ends; pods that clearly fail their requests take the revision back, whose old pods are still there for what was
not proven. Starting ends with the first proven pod. Going back: the weight first, then the pods.

`decide` is called with the state as it was last written, and says what the state is now, how many replicas each
revision gets and which share of the requests. The state is written before anything is done about it, so whoever comes
next, at any instant, goes on from the same place. A spec that goes back to the stable revision is a way back, not a
third one; any other change in the middle starts anew towards the new target, with the same stable revision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from mainsail_operator import capacity
from mainsail_operator.gate import Verdict, Watch, longest_proof, proven
from mainsail_operator.observe import Observed, Revision
from mainsail_operator.types import Phase, RolloutSpec, RolloutStatus, RolloutStep, seconds

CRASHES = 3
"""Restarts of one pod that make its revision a bad one. One or two may be the node's fault."""
STEADY_S = 120.0
"""A pod that has served for this long has got over its crashes."""
DEFAULT_STEPS = (RolloutStep(weight=10, hold="2m"), RolloutStep(weight=50, hold="5m"))
COMMAND = "mainsail.dev/rollout"
"""Annotation: pause (for as long as it is there), promote, rollback or retry (once; see `verb`)."""
_TRUSTED = ("PromotedByHand", "Reverted")
"""Reasons of a way forward that nothing is asked of: somebody said so, or it was proven before."""
_STABLE_FAILS, _ASLEEP, _PAUSED = "StableFails", "ScaledToZero", "Paused"


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision is made of. Times are Unix seconds."""

    spec: RolloutSpec
    target: str
    """The Deployment of the revision that the spec asks for; it need not exist yet."""
    desired: int
    """Replicas that serve, whichever revision they are of."""
    observed: Observed
    command: str = ""
    """The annotation's value."""
    verdict: Verdict | None = None
    """The gate's judgement of the step that is under way; None: nothing is known yet."""
    watch: Watch = field(default_factory=Watch)
    """How far the target's pods have been watched, where errors alone are judged."""
    now: float = 0.0

    def named(self, name: str) -> Revision | None:
        return next((found for found in self.observed.revisions if found.name == name), None)

    @property
    def steps(self) -> Sequence[RolloutStep]:
        if self.spec.strategy == "BlueGreen":
            return ()
        return self.spec.steps or DEFAULT_STEPS


@dataclass(frozen=True, slots=True)
class Decision:
    status: RolloutStatus
    replicas: Mapping[str, int]
    """By Deployment; the target's may have to be made, and one that is not named is to go."""
    weights: Mapping[str, int] = field(default_factory=dict[str, int])
    check_at: float | None = None
    """When time alone may change the decision."""


def verb(command: str) -> str:
    """`promote@2026-11-25` → `promote`: what follows the @ makes a command a new one."""
    return command.partition("@")[0].strip()


def decide(before: RolloutStatus | None, it: Situation) -> Decision:
    """The next state, replicas and weights."""
    state = _advanced(_resumed(_ordered(_entered(before, it), it), it), it)
    drain_first = state.drain_first or _makes_way(state, it)
    if drain_first != state.drain_first:
        state = state.model_copy(update={"drain_first": True})
    replicas = _replicas(state, it)
    return Decision(_explained(state, it), replicas, _weights(state, it), _check_at(state, it))


# --- where it stands


def _entered(before: RolloutStatus | None, it: Situation) -> RolloutStatus:
    """Where the decision starts from: a new target begins anew, a stable revision that is gone is forgotten."""
    others = [revision for revision in it.observed.revisions if revision.name != it.target]
    command = before.command if before else ""
    if before is not None and before.target == it.target:
        gone = bool(before.stable) and before.stable != it.target and it.named(before.stable) is None
        if not gone:
            return before
        state = before.model_copy(update={"stable": ""})
        return _start(it, "", command) if before.phase in ("RollingBack", "RolledBack") else state
    if before is not None and before.stable == it.target and before.target != it.target and it.named(it.target):
        message = f"The spec asks for {it.target} again."
        return _state("Promoting", it, "Reverted", message, stable=it.target, command=command)
    if before is None:
        return _start(it, _oldest(others), command)
    stable = before.target if before.phase in ("Complete", "Promoting") else before.stable
    if it.named(stable) is None or stable == it.target:
        stable = _oldest([revision for revision in others if revision.serving])
    return _start(it, stable, command)


def _oldest(revisions: Sequence[Revision]) -> str:
    """Without a record, what has served longest is what was proven."""
    by_age = sorted(revisions, key=lambda revision: (not revision.serving, revision.created))
    return by_age[0].name if by_age else ""


def _start(it: Situation, stable: str, command: str, reason: str = "Started", step: int = 1) -> RolloutStatus:
    gated = it.spec.strategy != "RollingUpdate" and bool(stable)
    return _state("Starting", it, reason, "", stable=stable, command=command, step=step if gated else 0)


def _state(
    phase: Phase, it: Situation, reason: str, message: str, *, stable: str, command: str, step: int = 0
) -> RolloutStatus:
    since = datetime.fromtimestamp(it.now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return RolloutStatus(
        phase=phase, step=step, stable=stable, target=it.target, since=since, reason=reason, message=message,
        command=command,
    )  # fmt: skip


def _moved(
    state: RolloutStatus, it: Situation, phase: Phase, reason: str, message: str = "", *, step: int = 0
) -> RolloutStatus:
    moved = _state(phase, it, reason, message, stable=state.stable, command=state.command, step=step)
    return moved.model_copy(update={"drain_first": state.drain_first})


def since(state: RolloutStatus) -> float:
    """When the phase or step began, in Unix seconds; 0 when that cannot be read."""
    return unix(state.since)


def unix(timestamp: str) -> float:
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return 0.0


def _ordered(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """What a person said, once."""
    if it.command == state.command:
        return state
    state = state.model_copy(update={"command": it.command})
    stable = it.named(state.stable) if state.stable != state.target else None
    way_back = stable is not None and (stable.serving > 0 or not it.desired)
    under_way = state.phase in ("Starting", "Gating", "Promoting", "Stalled")
    match verb(it.command):
        case "promote" if state.phase in ("Starting", "Gating") or (state.phase == "Stalled" and state.stable):
            return _moved(state, it, "Promoting", "PromotedByHand", "Promoted by hand: the gate is skipped.")
        case "rollback" if under_way and way_back:
            return _moved(state, it, "RollingBack", "RolledBackByHand", "Rolled back by hand.")
        case "retry" if state.phase in ("RollingBack", "RolledBack", "Stalled"):
            return _start(it, state.stable, state.command, "RetriedByHand")
        case _:
            return state


def _resumed(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """After a sleep at zero, or a pause before it began, the time that passed does not count."""
    woke = state.reason == _ASLEEP and it.desired > 0 and state.phase in ("Starting", "Gating")
    resumed = state.reason == _PAUSED and verb(it.command) != "pause" and state.phase == "Starting"
    return _moved(state, it, state.phase, "Resumed", step=state.step) if woke or resumed else state


# --- one step on


def _advanced(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """The state after what is observed now: at most one transition."""
    match state.phase:
        case "Starting" | "Promoting":
            return _failed(state, it) or _unfit(state, it) or _grown(state, it)
        case "Gating":
            return _failed(state, it) or _judged(state, it)
        case "RollingBack":
            return _back(state, it)
        case "Stalled":
            return _mended(state, it)
        case _:  # Complete and RolledBack wait for another spec
            return state


@dataclass(frozen=True, slots=True)
class Failure:
    reason: str
    message: str


def failure(target: Revision | None, wanted: int, began: float, deadline_s: float, now: float) -> Failure | None:
    """Why the revision is a bad one: it cannot load, keeps crashing, or makes no progress."""
    if target is None:
        return None
    for pod in target.alive:
        trouble = pod.trouble
        if trouble and trouble.load_failure and (pod.restarts >= CRASHES or (trouble.told and not target.serving)):
            return Failure(trouble.reason, f"pod {pod.name}: {trouble.message}")
    for pod in target.alive:
        if pod.restarts >= CRASHES and not (pod.serving and now - pod.progress >= STEADY_S):
            return Failure("CrashLoop", f"the engine of pod {pod.name} has restarted {pod.restarts} times")
    if target.serving < wanted and now - last_progress(target, began) > deadline_s:
        why = (target.trouble.message if target.trouble else "") or target.refusal or "its pods do not begin to serve"
        return Failure(
            "ProgressDeadlineExceeded",
            f"{target.serving} of {wanted} replicas serve, and none was added within the progress deadline: {why}",
        )
    return None


def last_progress(target: Revision, began: float) -> float:
    """When it last came a step further: began, made (after its model was fetched), a pod placed, a pod that serves."""
    return max([began, unix(target.created), *(pod.progress for pod in target.alive)])


def _failed(state: RolloutStatus, it: Situation) -> RolloutStatus | None:
    paused = verb(it.command) == "pause"
    deadline_s = float("inf") if paused or it.desired == 0 else _deadline_s(state, it)
    found = failure(it.named(it.target), _wanted(state, it), since(state), deadline_s, it.now)
    return _give_up(state, it, found.reason, found.message) if found else None


Judged = Literal["Nothing", "Errors", "Everything"]


def judged(state: RolloutStatus | None, spec: RolloutSpec, target: str) -> Judged:
    """What of the gate is asked in this state."""
    if state is None or state.target != target:
        return "Nothing"
    if state.phase == "Gating":
        return "Everything"
    beside = state.phase in ("Starting", "Promoting") and state.stable not in ("", target)
    return "Errors" if spec.strategy == "RollingUpdate" and beside and state.reason not in _TRUSTED else "Nothing"


def _deadline_s(state: RolloutStatus, it: Situation) -> float:
    """How long nothing may come of it: a pod that serves and has to prove itself is no standstill."""
    target = it.named(it.target)
    proves = target is not None and target.serving > 0 and judged(state, it.spec, it.target) == "Errors"
    proof_s = longest_proof(seconds(it.spec.min_ready)) if proves else 0.0
    return seconds(it.spec.progress_deadline) + proof_s


def _unfit(state: RolloutStatus, it: Situation) -> RolloutStatus | None:
    """A RollingUpdate whose new pods serve, and fail."""
    if it.verdict is None or it.verdict.outcome != "Fail" or judged(state, it.spec, it.target) != "Errors":
        return None
    return _give_up(state, it, "GateFailed", it.verdict.message)


def _give_up(state: RolloutStatus, it: Situation, reason: str, message: str) -> RolloutStatus:
    if it.spec.auto_rollback and state.stable not in ("", it.target):
        return _moved(state, it, "RollingBack", reason, f"Revision {it.target} has failed: {message}")
    if state.stable == it.target:
        state = state.model_copy(update={"stable": ""})
    return _moved(state, it, "Stalled", reason, f"Revision {it.target} has failed: {message}", step=state.step)


def _grown(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """On from Starting or Promoting, when enough of the target serves."""
    target = it.named(it.target)
    serving = target.serving if target else 0
    alone = len(it.observed.revisions) == (1 if target else 0)
    frozen = verb(it.command) == "pause" or (it.desired == 0 and state.step > 0)
    if target is None or frozen or serving < _wanted(state, it):
        return state
    if state.step and state.phase == "Starting":
        weight = _weight(state, it)
        return _moved(state, it, "Gating", "Judging", f"Judging it at {weight} % of the requests.", step=state.step)
    if alone and serving >= it.desired:
        return _moved(state, it, "Complete", "Complete", "The newest revision is the only one.").model_copy(
            update={"stable": it.target, "drain_first": False}
        )
    if state.phase == "Starting" and state.stable and _fit(state, it):
        moved = _moved(state, it, "Promoting", "Serves", "The newest revision serves and takes over.")
        return moved.model_copy(update={"since": state.since})  # what was seen of its pods goes on counting
    return state


def _judged(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """On from Gating: the next step, the promotion, or back."""
    verdict = it.verdict
    if verdict is not None and verdict.outcome == "Fail":
        return _give_up(state, it, "GateFailed", verdict.message)
    began = since(state)
    if verb(it.command) == "pause" or it.desired == 0 or it.now < began + _hold_s(state, it) or verdict is None:
        return state
    if verdict.outcome == "Inconclusive":
        late = it.now >= began + seconds(it.spec.progress_deadline)
        if not late or it.spec.gate.on_inconclusive == "Hold":
            return state
        if it.spec.gate.on_inconclusive == "Rollback":
            return _give_up(state, it, "Inconclusive", f"the gate could not be judged in time: {verdict.message}")
    if state.step < len(it.steps):
        weight = it.steps[state.step].weight
        return _moved(state, it, "Starting", "NextStep", f"{verdict.message}. On to {weight} %.", step=state.step + 1)
    unsure = "The gate could not be judged in time, and gate.onInconclusive is Proceed"
    told = "The gate has passed" if verdict.outcome == "Pass" else unsure
    return _moved(state, it, "Promoting", "GatePassed", f"{told}: {verdict.message}.")


def _back(state: RolloutStatus, it: Situation) -> RolloutStatus:
    stable = it.named(state.stable)
    serves = stable is not None and stable.serving >= it.desired
    if serves and all(revision.name == state.stable for revision in it.observed.revisions):
        return _moved(state, it, "RolledBack", state.reason, state.message)
    began, deadline_s = since(state), seconds(it.spec.progress_deadline)
    found = failure(stable, it.desired, began, deadline_s, it.now) if it.desired and not serves else None
    if found is not None:
        message = f"{state.message} And {state.stable}, which served before, does not come back: {found.message}"
        return _moved(state, it, "Stalled", _STABLE_FAILS, message)
    return state


def _mended(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """A target that could not load may do so after all (a full claim, a node that came back). A gate's word stands."""
    if state.reason in ("GateFailed", "Inconclusive"):
        return state
    stable = it.named(state.stable)
    if state.reason == _STABLE_FAILS:
        back = not it.desired or _sound(stable, it)
        return _moved(state, it, "RollingBack", "Mended", f"{state.stable} serves again.") if back else state
    target = it.named(it.target)
    if target is None or it.desired == 0 or _sound(target, it):
        return _start(it, state.stable, state.command, "Mended", max(state.step, 1))
    return state


def _sound(revision: Revision | None, it: Situation) -> bool:
    """All its pods serve, and not only for a moment between two crashes."""
    if revision is None or not revision.alive or not all(pod.serving for pod in revision.alive):
        return False
    return failure(revision, 0, it.now, float("inf"), it.now) is None


# --- what follows from where it stands


def _wanted(state: RolloutStatus, it: Situation) -> int:
    """Replicas of the target that must serve before it goes on."""
    if state.phase == "Starting" and not state.step and state.stable:
        return min(1, it.desired)
    return _size(state, it)


def _fit(state: RolloutStatus, it: Situation) -> int:
    """Replicas of the target that may each replace an old one."""
    target = it.named(it.target)
    if target is None or (state.phase == "Stalled" and state.stable not in ("", it.target)):
        return 0
    if judged(state, it.spec, it.target) != "Errors":
        return target.serving
    min_ready_s = seconds(it.spec.min_ready)
    return sum(
        pod.serving and proven(pod.name, pod.progress, it.watch, it.spec.gate, min_ready_s, it.now)
        for pod in target.alive
    )


def _size(state: RolloutStatus, it: Situation) -> int:
    """Replicas that the target is to have in this phase."""
    if state.step and it.spec.strategy == "Canary":
        return capacity.share_of(it.steps[min(state.step, len(it.steps)) - 1].weight, it.desired)
    return it.desired


def _weight(state: RolloutStatus, it: Situation) -> int:
    """The target's percent of the requests in its step."""
    return 100 if it.spec.strategy == "BlueGreen" else it.steps[min(state.step, len(it.steps)) - 1].weight


def _hold_s(state: RolloutStatus, it: Situation) -> int:
    if it.spec.strategy == "BlueGreen":
        return seconds(it.spec.hold)
    return seconds(it.steps[min(state.step, len(it.steps)) - 1].hold)


def _on_trial(state: RolloutStatus, it: Situation) -> bool:
    """The target stands beside a stable revision and has not been found good yet."""
    return bool(state.step) and state.phase in ("Starting", "Gating", "Stalled") and it.named(state.stable) is not None


def _rising(state: RolloutStatus) -> str:
    """The revision that is to serve in the end."""
    return state.stable if _goes_back(state) else state.target


def _goes_back(state: RolloutStatus) -> bool:
    return state.phase in ("RollingBack", "RolledBack") or state.reason == _STABLE_FAILS


def _rest(it: Situation, *names: str) -> list[Revision]:
    return [revision for revision in it.observed.revisions if revision.name not in names]


def _makes_way(state: RolloutStatus, it: Situation) -> bool:
    """Whether an old replica ends before a new one starts."""
    rising = _rising(state)
    others = _rest(it, rising)
    under_way = state.phase in ("Starting", "Gating", "Promoting", "RollingBack")
    if not others or not under_way or it.spec.gpu_policy == "Surge" or it.desired == 0:
        return False
    if it.spec.gpu_policy == "DrainFirst" and state.phase != "RollingBack":
        return True
    wanted = it.desired if rising == state.stable else _size(state, it)
    return capacity.no_room(it.named(rising), wanted, others, it.now)


def _replicas(state: RolloutStatus, it: Situation) -> capacity.Replicas:
    stable = it.named(state.stable)
    if verb(it.command) == "pause" and it.desired and state.phase in ("Starting", "Promoting"):
        held = {revision.name: revision.replicas for revision in it.observed.revisions}
        if held and stable is not None and state.phase == "Starting" and not state.drain_first:
            held[state.stable] = it.desired
        if held:
            return held
    if state.phase == "Stalled" and state.reason == "GateFailed" and not state.step and stable is not None:
        return {revision.name: revision.replicas for revision in it.observed.revisions}  # autoRollback is off
    if _goes_back(state) and stable is not None:
        others = [revision for revision in _rest(it, state.stable) if revision.serving]
        return capacity.roll(
            state.stable, stable, others, it.desired, fit=stable.serving, drain_first=state.drain_first, at_once=True
        )
    if _on_trial(state, it) and stable is not None:
        others = _rest(it, state.stable, it.target)
        size = _size(state, it)
        return capacity.beside(
            it.target, it.named(it.target), size, stable, others, it.desired, drain_first=state.drain_first
        )
    reverted = state.reason == "Reverted"
    # What never served, or is on its way out, holds no place.
    others = [r for r in _rest(it, it.target) if r.serving or (state.stable and not reverted)]
    return capacity.roll(
        it.target, it.named(it.target), others, it.desired, fit=_fit(state, it), drain_first=state.drain_first,
        at_once=reverted,
    )  # fmt: skip


def _weights(state: RolloutStatus, it: Situation) -> Mapping[str, int]:
    revisions = it.observed.revisions
    if state.phase in ("RollingBack", "RolledBack") or (state.phase == "Stalled" and state.stable):
        return capacity.split(it.target, 0, revisions)
    if _on_trial(state, it):
        blue_green = it.spec.strategy == "BlueGreen"
        if state.phase == "Gating":
            return capacity.split(it.target, _weight(state, it), revisions)
        if blue_green and state.drain_first:
            return capacity.by_serving(revisions)
        earlier = it.steps[state.step - 2].weight if state.step > 1 and not blue_green else 0
        return capacity.split(it.target, earlier, revisions)
    shares = capacity.by_serving(revisions)
    passed = state.phase == "Promoting" and state.reason == "GatePassed"
    if passed and shares.get(it.target):
        at_least = 100 if it.spec.strategy == "BlueGreen" else it.steps[-1].weight
        return capacity.split(it.target, max(shares[it.target], at_least), revisions)
    return shares


def _check_at(state: RolloutStatus, it: Situation) -> float | None:
    began = since(state)
    times: list[float] = []
    if state.phase in ("Starting", "Promoting", "Stalled"):
        target = it.named(it.target)
        progress = last_progress(target, began) if target else began
        times.append(progress + _deadline_s(state, it) + 1)
    if state.phase == "Gating":
        times += [began + _hold_s(state, it), began + seconds(it.spec.progress_deadline)]
    waiting = [
        pod.unschedulable_since for r in it.observed.revisions for pod in r.alive if pod.unschedulable_since is not None
    ]
    times += [since + capacity.NO_ROOM_AFTER_S for since in waiting]
    return min((time for time in times if time > it.now), default=None)


# --- in words


def _explained(state: RolloutStatus, it: Situation) -> RolloutStatus:
    """The state with the reason and the message of this moment."""
    reason, message = state.reason, state.message
    if state.phase in ("Starting", "Gating", "Promoting") and verb(it.command) == "pause":
        where = f" at step {state.step}" if state.step else ""
        # What was passed on the way to Promoting is still needed: only the words change there.
        reason = state.reason if state.phase == "Promoting" else _PAUSED
        message = f"Paused{where} by the annotation {COMMAND}; remove it to go on."
    elif state.phase == "Starting":
        reason, message = _starting(state, it)
    elif state.phase == "Gating":
        reason, message = _gating(state, it)
    elif state.phase == "Promoting" and _proving(state, it):
        message = _proving(state, it)
    return state.model_copy(update={"reason": reason, "message": message[:1000]})


def _starting(state: RolloutStatus, it: Situation) -> tuple[str, str]:
    target = it.named(it.target)
    done, wanted = target.serving if target else 0, _size(state, it)
    if it.desired == 0:
        return _ASLEEP, "No replica is wanted; goes on when replicas are wanted again."
    count = f"{done} of {wanted} replicas of the newest revision serve"
    if target is not None and target.refusal:
        return "PodsRefused", f"{count}; the API server refuses its pods: {target.refusal}"
    if state.drain_first:
        return "DrainFirst", f"{count}; no room beside the old ones, so they are replaced one at a time."
    if target is not None and target.trouble is not None and target.trouble.reason == "Unschedulable":
        return "WaitingForRoom", f"{count}; the scheduler: {target.trouble.message}"
    if told := _proving(state, it):
        return "Proving", told
    return "WaitingForPods", f"{count}."


def _proving(state: RolloutStatus, it: Situation) -> str:
    """Whom a RollingUpdate watches before it goes on; empty: nobody."""
    target = it.named(it.target)
    if target is None or judged(state, it.spec, it.target) != "Errors":
        return ""
    fit, serving = _fit(state, it), target.serving
    if fit == serving:
        return ""
    return (
        f"{fit} of {it.desired} replicas of the newest revision have proven themselves; {serving - fit} more serve and "
        f"are watched for {it.spec.min_ready} (up to {longest_proof(seconds(it.spec.min_ready)):.0f} s where requests "
        "are few) by what the gateways tell, before they replace old ones."
    )


def _gating(state: RolloutStatus, it: Situation) -> tuple[str, str]:
    where = f"at {_weight(state, it)} % of the requests"
    if it.spec.strategy == "Canary":
        where = f"step {state.step} of {len(it.steps)}, {where}"
    if it.desired == 0:
        return _ASLEEP, f"{where}: goes on when replicas serve again."
    if it.verdict is None:
        return "WaitingForMetrics", f"{where}: no gateway has told its metrics yet."
    if it.verdict.outcome == "Inconclusive":
        return it.verdict.reason, f"{where}: {it.verdict.message}."
    until = datetime.fromtimestamp(since(state) + _hold_s(state, it), UTC).strftime("%H:%M:%SZ")
    return "Holding", f"{where}: good so far, holds until {until}."


State = Literal["moving", "done", "failed"]


def kind_of(state: RolloutStatus | None) -> State:
    """What a rollout means for a pipeline that waits for it."""
    if state is None or state.phase == "Complete":
        return "done"
    return "failed" if state.phase in ("Stalled", "RolledBack", "RollingBack") else "moving"
