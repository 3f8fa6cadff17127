"""One pass over one InferenceService: observe → decide → status → plan → apply. And the tasks that make passes.

Each object has one task, woken by any event of it or of a child and by a tick; passes of one object never overlap, and
one that keeps failing (with growing pauses) holds up no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import cast

import httpx2
from pydantic import ValidationError

from mainsail_operator.apply import NotLeaderError, RefusedError, StaleError, WriteError, Writer
from mainsail_operator.events import events
from mainsail_operator.fetched import Fetch, Fetcher, Filler, progress_of
from mainsail_operator.fetched import judge as judge_fetch
from mainsail_operator.fetching import copy_name, is_fetched
from mainsail_operator.gate import Evidence, Verdict, Watch, collect, judge, judge_errors, together
from mainsail_operator.groups import MISSING
from mainsail_operator.lease import Lease
from mainsail_operator.objects import PAUSED, Owner, deployment_name, filler, is_grouped, revision_of
from mainsail_operator.observe import Child, Deployment, Observed, Pod, observe
from mainsail_operator.plan import Action, Apply, Plan, plan
from mainsail_operator.rollout import COMMAND, Decision, Situation, decide, judged, since
from mainsail_operator.scrape import Target
from mainsail_operator.settings import Settings
from mainsail_operator.signals import PodLoad, Signals
from mainsail_operator.sizing import Sized, Sizer
from mainsail_operator.status import invalid, status
from mainsail_operator.store import Key
from mainsail_operator.types import JSON, InferenceServiceSpec, InferenceServiceStatus, RolloutStatus

log = logging.getLogger(__name__)

TICK_S = 15.0
SCALED_TICK_S = 5.0
"""Of a service whose load decides its replicas, or whose model is being fetched: as often as its pods are scraped."""
GATING_TICK_S = 2.0
_BACKOFF_S = (0.5, 60.0)
_DEAF_S = 2.0
_REPAIR_S = 60.0
"""Between two repairs of one child: whoever else writes it, against us, gets no faster than that."""
_STALE_S = 0.5
"""After a write that was decided on an old picture: the watch is about to bring the new one."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An InferenceService and its children, as the watches have them."""

    body: JSON
    deployments: Sequence[Deployment]
    pods: Sequence[Pod]
    children: Sequence[Child]
    """Services, ServiceAccounts, …"""
    endpoints: Sequence[frozenset[str]]
    """UIDs of the pods that gateways route to, by EndpointSlice."""
    fillers: Sequence[Filler] = ()
    fetchers: Sequence[Fetcher] = ()
    gone: Callable[[str], bool] = lambda node: False
    """Whether there is no such node."""
    kept: Callable[[], Collection[str]] = tuple
    """The copies of models that any service or pod uses."""
    workers: Sequence[Pod] = ()
    """Of replicas with several pods, those that are not leaders."""


Read = Callable[[Key], Snapshot | None]
"""None: the InferenceService is gone."""
Want = Callable[[Key, Sequence[Target]], None]
"""Says which pods' load this service's decisions need (`scrape.Scraper.want`)."""


class Reconciler:
    def __init__(
        self, writer: Writer, lease: Lease, settings: Settings, read: Read, want: Want, signals: Signals, sizer: Sizer,
        *, groups: bool = True,
    ) -> None:  # fmt: skip
        """groups: whether the cluster has LeaderWorkerSets."""
        self._groups = groups
        self._writer = writer
        self._sizer = sizer
        self._want = want
        self._signals = signals
        self._lease = lease
        self._settings = settings
        self._read = read
        self._wakes: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._watched: dict[Key, float] = {}
        """Since when (Unix seconds) the load of its pods and what gateways say of them is asked for."""
        self._refusals: dict[Key, str] = {}
        """What the API server said to the last write, where it refused it."""
        self._repaired: dict[Key, dict[str, float]] = {}
        """When (monotonic) a child was last set right that somebody had changed."""

    def wake(self, key: Key) -> None:
        """Something about this object changed. Starts its task when there is none."""
        if key not in self._tasks:
            self._wakes[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._run(key), name=f"reconcile {key[0]}/{key[1]}")
        self._wakes[key].set()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, key: Key) -> None:
        failures, pause = 0, TICK_S
        try:
            while True:
                if failures > 1:  # events of a failing object do not make it fail faster
                    await asyncio.sleep(min(pause, _DEAF_S))
                await self._woken(key, pause)
                await self._lease.acquired.wait()
                snapshot = self._read(key)
                if snapshot is None:
                    self._want(key, ())
                    self._watched.pop(key, None)
                    self._sizer.forget(key)
                    return
                pause = await self._guarded(key, snapshot)
                failures = failures + 1 if pause is None else 0
                if pause is None:
                    pause = min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**failures)
        finally:
            self._tasks.pop(key, None)
            self._wakes.pop(key, None)
            self._refusals.pop(key, None)
            self._repaired.pop(key, None)

    async def _woken(self, key: Key, pause: float) -> None:
        try:
            async with asyncio.timeout(pause):
                await self._wakes[key].wait()
        except TimeoutError:
            pass
        self._wakes[key].clear()

    async def _guarded(self, key: Key, snapshot: Snapshot) -> float | None:
        """A pass whose failure is said and stays its own. Seconds until the next one is due; None: it failed."""
        try:
            pause = await self._pass(snapshot)
        except NotLeaderError:
            return TICK_S
        except StaleError as error:
            log.debug("%s/%s: %s", *key, error)
            return _STALE_S
        except RefusedError as error:
            self._refused(key, str(error))
            return None
        except (WriteError, httpx2.HTTPError, OSError) as error:
            log.warning("%s/%s: %s", *key, error or type(error).__name__)
            return None
        except Exception:
            log.exception("%s/%s: the pass failed", *key)
            return None
        self._refused(key, "")
        return pause

    def _refused(self, key: Key, message: str) -> None:
        """Remember what was refused, and let the next pass tell it."""
        if message == self._refusals.get(key, ""):
            return
        if message:
            log.warning("%s/%s: refused: %s", *key, message)
            self._refusals[key] = message
        else:
            self._refusals.pop(key, None)
        self._wakes[key].set()

    async def _pass(self, snapshot: Snapshot) -> float:
        """Seconds until the next pass is due without any event."""
        body, now = snapshot.body, time.time()
        metadata: JSON = body["metadata"]
        if metadata.get("deletionTimestamp"):
            return TICK_S
        owner = Owner(metadata["name"], metadata["namespace"], metadata["uid"])
        before = _status_of(body)
        try:
            spec = InferenceServiceSpec.model_validate(body.get("spec", {}))
        except ValidationError as error:
            told = invalid(owner, int(metadata.get("generation", 0)), str(error), before, now, self._settings)
            if told != before:
                await self._writer.status(owner, told, str(metadata.get("resourceVersion", "")))
            return TICK_S
        seen = observe(
            snapshot.deployments, snapshot.pods, snapshot.children, snapshot.endpoints, owner.uid, now=now,
            gone=snapshot.gone, workers=snapshot.workers,
        )  # fmt: skip
        # Two revisions: the newest is judged beside the one before it.
        wanted = spec.scaling is not None or len(seen.revisions) > 1
        fetchers = [one for one in snapshot.fetchers if is_fetched(spec) and one.model == copy_name(spec)]
        fetching = [one.metrics for one in fetchers if one.metrics is not None]
        self._want((owner.namespace, owner.name), fetching + (seen.targets if wanted else []))
        self._watch((owner.namespace, owner.name), now if wanted else None)
        sized = self._sizer.size(owner, spec, seen, metadata.get("annotations") or {}, before.scaling, now)
        return await self._carry_out(
            _Pass(owner, sized.effective(spec), metadata, seen, before, now, snapshot.fillers, fetchers, snapshot.kept),
            sized,
        )

    async def _carry_out(self, it: _Pass, sized: Sized) -> float:
        """Decide, write the state down, then act on it: whoever is killed in between leaves a state to go on from."""
        decision = decide(it.before.rollout, self._situation(it))
        paused, fetch = it.annotation(PAUSED) == "true", self._fetch(it)
        told = status(
            it.owner, it.spec, it.generation, it.seen, decision, it.before.conditions, it.now,
            settings=self._settings, refusal=self._refusals.get(it.key, ""), paused=paused, fetch=fetch,
            lacking=None if self._can_make(it.spec) else MISSING,
        )  # fmt: skip
        told = sized.told(told, it.generation, it.before.conditions, it.now)
        if told != it.before:
            await self._writer.status(it.owner, told, str(it.metadata.get("resourceVersion", "")))
            for event in events(it.before, told):
                await self._writer.tell(it.owner, event, it.now)
        if not paused:
            await self._execute(it.owner, self._plan(it, decision).actions)
        soon = self._sizer.watches(it.key) or (fetch is not None and not fetch.done)
        tick = SCALED_TICK_S if soon else TICK_S
        if judged(decision.status, it.spec.rollout, decision.status.target) != "Nothing":
            tick = GATING_TICK_S
        return min(tick, max(decision.check_at - it.now, 0.1)) if decision.check_at else tick

    async def _execute(self, owner: Owner, actions: Sequence[Action]) -> None:
        """What is refused (by a quota, by a policy, for a webhook that is down) holds up what is made after it, and
        nothing that is there already: pods without what guards them are not made, and what serves is scaled, taken back
        or replaced all the same."""
        failed: WriteError | None = None
        for action in actions:
            if not isinstance(action, Apply):
                await self._writer.execute(owner, action)
            elif failed is None and self._due(owner, action):
                try:
                    await self._writer.execute(owner, action)
                except WriteError as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    def _due(self, owner: Owner, action: Apply) -> bool:
        """Whether it is time for it: repairs of the same child have a pause between them."""
        if not action.repair:
            return True
        now, repaired = time.monotonic(), self._repaired.setdefault((owner.namespace, owner.name), {})
        if now - repaired.get(action.child, float("-inf")) < _REPAIR_S:
            return False
        repaired[action.child] = now
        return True

    def _plan(self, it: _Pass, decision: Decision) -> Plan:
        return plan(
            it.owner, it.spec, it.seen, self._settings, decision, self._loads(it), it.fillers, it.kept, it.now,
            makes=self._can_make(it.spec),
        )  # fmt: skip

    def _can_make(self, spec: InferenceServiceSpec) -> bool:
        return self._groups or not is_grouped(spec)

    def _fetch(self, it: _Pass) -> Fetch | None:
        """How far the model is, where it is fetched and anybody is to do so."""
        manifest = filler(it.owner, it.spec, self._settings)
        if not is_fetched(it.spec) or (manifest is None and not it.fetchers):
            return None
        name = manifest["metadata"]["name"] if manifest else ""
        complete = any(one.name == name and one.complete for one in it.fillers if one.owner == it.owner.uid)
        known = [progress_of(self._signals.engines.get(one.uid), it.now) for one in it.fetchers]
        furthest = max((one for one in known if one is not None), key=lambda one: one.done, default=None)
        return judge_fetch(it.fetchers, furthest, complete=complete)

    def _watch(self, key: Key, now: float | None) -> None:
        """Remember since when. None: not any more."""
        if now is None:
            self._watched.pop(key, None)
        else:
            self._watched.setdefault(key, now)

    def _situation(self, it: _Pass) -> Situation:
        target, rollout = deployment_name(it.owner, revision_of(it.spec)), it.before.rollout
        asked = judged(rollout, it.spec.rollout, target)
        known = rollout is not None and asked != "Nothing" and self._signals.gateways
        canary = collect(self._signals, *it.key, target, since(rollout)) if rollout and known else []
        old = collect(self._signals, *it.key, rollout.stable, since(rollout)) if rollout and known else []
        watch = Watch(
            since=self._watched.get(it.key, it.now), until=self._signals.gateways_until(it.now),
            requests={one.pod: one.requests for one in (*canary, *old)},
        )  # fmt: skip
        return Situation(
            spec=it.spec.rollout, target=target, desired=it.spec.replicas, observed=it.seen,
            command=it.annotation(COMMAND), now=it.now, watch=watch,
            verdict=self._verdict(it, rollout, canary, old) if rollout and known else None,
        )  # fmt: skip

    def _verdict(
        self, it: _Pass, rollout: RolloutStatus, canary: Sequence[Evidence], old: Sequence[Evidence]
    ) -> Verdict:
        """The gate's word on the step that is under way."""
        if it.spec.rollout.strategy == "BlueGreen":
            # Beside a revision that has all the requests, the old one is known only from before.
            old = collect(self._signals, *it.key, rollout.stable, 0.0)
        stable = together(old, rollout.stable)
        everything = judged(rollout, it.spec.rollout, rollout.target) == "Everything"
        return (judge if everything else judge_errors)(it.spec.rollout.gate, canary, stable)

    def _loads(self, it: _Pass) -> dict[str, float]:
        pods = [pod for revision in it.seen.revisions for pod in revision.alive]
        loads = {pod.uid: self._signals.load(pod.uid, it.now) for pod in pods}
        return {uid: load_of(load) for uid, load in loads.items() if load is not None}


def load_of(load: PodLoad) -> float:
    """What would be lost with a pod, in requests: those that it has and the sessions that it keeps.

    Of two that have the same, the one whose cache saves less (a fraction of a request) is the one to end."""
    return load.running + load.waiting + load.sessions + min(load.warmth, 10_000.0) / 10_100.0


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass is about."""

    owner: Owner
    spec: InferenceServiceSpec
    """With the number of replicas that counts, whoever decided it."""
    metadata: JSON
    seen: Observed
    before: InferenceServiceStatus
    now: float
    fillers: Sequence[Filler]
    fetchers: Sequence[Fetcher]
    """Those that fetch the model that the spec names."""
    kept: Callable[[], Collection[str]]

    @property
    def key(self) -> Key:
        return self.owner.namespace, self.owner.name

    @property
    def generation(self) -> int:
        return int(self.metadata.get("generation", 0))

    def annotation(self, name: str) -> str:
        return str(cast(JSON, self.metadata.get("annotations") or {}).get(name, ""))


def _status_of(body: JSON) -> InferenceServiceStatus:
    """The status that is there: of a newer operator's, what this one knows of it. It stands where that one stood, and a
    patch takes no unknown field away. One that cannot be read is as good as none."""
    raw = cast(JSON, body.get("status") or {})
    try:
        return InferenceServiceStatus.model_validate(raw, extra="ignore")
    except ValidationError:
        return InferenceServiceStatus()
