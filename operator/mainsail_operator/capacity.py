"""How many replicas each revision gets, and which share of the requests: pure arithmetic under the rollout's phases.

    roll (RollingUpdate, Promoting, and back):
        to      0 ── a quarter at a time beyond what serves and is to stay ──▶ all replicas
        others  all ── one fewer for each of `to` that may replace one ──▶ 0, deleted once all of `to` may

    beside (Canary, BlueGreen):
        stable  all ───────────────────────────────────▶ all
        target  the step's share of the replicas, rounded up

What serves never shrinks below what is wanted, with one exception: where nodes (or a quota) have no room for a surge,
one old replica makes way at a time (`drain_first`). That never deadlocks, and never more than one is missing. None
makes way for a Deployment that is not there yet: its model may be on its way for an hour, or the API server refuse it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from mainsail_operator.observe import Revision

NO_ROOM_AFTER_S = 15.0
"""A pod that the scheduler has refused for this long will not be placed by waiting a little more."""
_SURGE = 0.25
"""How far beyond the replicas a roll may go at a time: more would make a cluster's autoscaler buy nodes for minutes."""

_WANTS_ROOM = re.compile(r"Insufficient |Too many pods|free ports|ReadWriteOncePod|exceeded quota")
"""What is said when the end of an old pod could help: not of a missing claim, nor of a wrong selector."""

Replicas = dict[str, int]
"""By Deployment. A revision that is not in it is to go."""


def no_room(target: Revision | None, wanted: int, others: Sequence[Revision], now: float) -> bool:
    """Nobody finds a place for the next new pod, and nothing is on the way that could change that."""
    if target is None or target.serving >= wanted or target.starting:
        return False
    if any(pod.ending for revision in (target, *others) for pod in revision.pods):
        return False
    if not any(revision.alive for revision in others):
        return False
    refused = [
        pod.unschedulable_since
        for pod in target.alive
        if pod.unschedulable_since is not None and pod.trouble and _WANTS_ROOM.search(pod.trouble.message)
    ]
    if refused and now - min(refused) >= NO_ROOM_AFTER_S:
        return True
    return len(target.alive) < target.replicas and bool(_WANTS_ROOM.search(target.refusal))


def roll(
    name: str, to: Revision | None, others: Sequence[Revision], desired: int, *, fit: int, drain_first: bool,
    at_once: bool = False,
) -> Replicas:  # fmt: skip
    """One revision takes over from the others. name: of `to`, which may not be there yet.

    fit: how many replicas of `to` may each replace one of the others. at_once: `to` has served before (a way back): it
    gets all its replicas now."""
    if desired == 0 or fit >= desired:
        return {name: desired}
    replicas = _shrunk(others, desired - fit - (1 if drain_first and to is not None else 0))
    if at_once or not any(revision.alive for revision in others):
        grown = desired
    elif drain_first:
        grown = fit + 1 if to is not None else 0
    else:
        kept = sum(min(replicas.get(revision.name, 0), revision.serving) for revision in others)
        grown = min(desired, desired - kept + max(1, math.ceil(desired * _SURGE)))
    replicas[name] = max(grown, min(to.replicas if to else 0, desired))
    return replicas


def _shrunk(others: Iterable[Revision], needed: int) -> Replicas:
    """The others, as far as they are needed. Whoever serves most and is youngest stays longest; none grows.

    Those of which nothing serves share what is left: each of them keeping as much would leave the newest no room."""
    replicas: Replicas = {}
    for revision in sorted(others, key=lambda r: (r.serving, r.created), reverse=True):
        if revision.serving == 0 and revision.trouble is not None and revision.trouble.load_failure:
            continue
        kept = min(revision.replicas, max(needed, 0))
        replicas[revision.name] = kept
        needed -= revision.serving or kept
    return replicas


def beside(
    name: str, target: Revision | None, wanted: int, stable: Revision, others: Sequence[Revision], desired: int, *,
    drain_first: bool,
) -> Replicas:  # fmt: skip
    """The target on trial beside the stable revision. wanted: the target's replicas now."""
    if desired == 0:
        return {name: 0, stable.name: 0}
    serving = target.serving if target else 0
    helping = [revision for revision in others if revision.serving and stable.serving < desired]
    if not drain_first:
        if helping:  # of an earlier rollout that was cut short: the stable revision takes over from them first
            back = roll(
                stable.name, stable, helping, desired, fit=stable.serving, drain_first=False, at_once=True
            )  # fmt: skip
            return back | {name: wanted}
        return {stable.name: desired, name: wanted}
    replaced = min(wanted, serving + 1) if target is not None else 0
    kept = _shrunk((stable, *helping), desired - replaced) if helping else {stable.name: max(desired - replaced, 0)}
    # A target on trial does not shrink: what crashes must be seen to crash again, and not be made anew.
    return kept | {name: max(replaced, min(target.replicas if target else 0, wanted))}


def share_of(weight: int, desired: int) -> int:
    """Replicas for a share of the requests in percent: at least one."""
    return max(1, math.ceil(desired * weight / 100)) if desired else 0


def by_serving(revisions: Iterable[Revision], total: int = 100) -> dict[str, int]:
    """Each serving pod the same share. The weights add up to the total, or are all 0 when nothing serves."""
    found = list(revisions)
    serving = sum(revision.serving for revision in found)
    weights = {revision.name: 0 for revision in found}
    left = total
    for revision in found:
        if serving:
            weights[revision.name] = round(left * revision.serving / serving)
        left, serving = left - weights[revision.name], serving - revision.serving
    return weights


def split(target: str, weight: int, revisions: Sequence[Revision]) -> Mapping[str, int]:
    """The target gets `weight` percent, the others the rest; whoever serves alone gets everything."""
    others = [revision for revision in revisions if revision.name != target]
    serves = any(revision.serving for revision in revisions if revision.name == target)
    if not any(revision.serving for revision in others):
        return by_serving(revisions)
    weight = weight if serves else 0
    return by_serving(others, 100 - weight) | {r.name: weight for r in revisions if r.name == target}
