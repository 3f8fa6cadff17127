"""How far a model is on its way to a service: read from the pods, the Job or the DaemonSet that fetch it (pure).

What fails is told in the fetcher's own words, which its pod's termination message carries; how far it is comes from its
metrics, which are scraped like those of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from mainsail_fetch.place import told
from mainsail_fetch.progress import BYTES, TOTAL_BYTES
from mainsail_fetch.source import folder, parse
from mainsail_operator.fetching import CONTAINER, PORT
from mainsail_operator.observe import words_of
from mainsail_operator.scrape import Target
from mainsail_operator.signals import History
from mainsail_operator.types import JSON, KIND


@dataclass(frozen=True, slots=True)
class Fetcher:
    """A container `fetch` as its pod's status tells of it."""

    uid: str
    done: bool
    running: bool
    model: str
    """The name of the copy."""
    reason: str = ""
    """Why it does not get on; empty: it does."""
    message: str = ""
    metrics: Target | None = None


@dataclass(frozen=True, slots=True)
class Filler:
    """A Job or DaemonSet that fetches ahead of need."""

    kind: str
    name: str
    complete: bool
    owner: str


def copied(service: JSON) -> str:
    """The name of the copy that an InferenceService asks for; empty when its model is not fetched."""
    model = cast(JSON, cast(JSON, service.get("spec") or {}).get("model") or {})
    uri, revision = str(model.get("uri") or ""), str(model.get("revision") or "main")
    return folder(uri, revision) if parse(uri, revision) is not None else ""


def read_filler(kind: str, obj: JSON) -> Filler:
    status = cast(JSON, obj.get("status") or {})
    if kind == "Job":
        complete = bool(status.get("succeeded"))
    else:
        wanted = int(status.get("desiredNumberScheduled") or 0)
        current = status.get("observedGeneration") == obj["metadata"].get("generation")
        complete = current and wanted > 0 and int(status.get("numberReady") or 0) >= wanted
    references = cast("list[JSON]", obj["metadata"].get("ownerReferences") or [])
    owner = next((str(one.get("uid")) for one in references if one.get("kind") == KIND), "")
    return Filler(kind, str(obj["metadata"]["name"]), complete, owner)


def read_fetcher(pod: JSON) -> Fetcher | None:
    """What a pod says about its container `fetch`, be that its only one or the engine's init container."""
    spec, status = cast(JSON, pod.get("spec") or {}), cast(JSON, pod.get("status") or {})
    containers = [
        *cast("list[JSON]", spec.get("initContainers") or []),
        *cast("list[JSON]", spec.get("containers") or []),
    ]
    container = next((one for one in containers if one.get("name") == CONTAINER), None)
    if container is None or pod["metadata"].get("deletionTimestamp"):
        return None
    statuses = [one for kind in ("initContainerStatuses", "containerStatuses")
                for one in cast("list[JSON]", status.get(kind) or []) if one.get("name") == CONTAINER]  # fmt: skip
    state = cast(JSON, statuses[0].get("state") or {}) if statuses else {}
    ended = cast(JSON, state.get("terminated") or {})
    arguments = cast("list[str]", container.get("args") or ["", ""])
    # A container without a probe is ready when it runs; one that stays has a probe that says whether it is done.
    stays = "--stay" in arguments and bool(statuses) and bool(statuses[0].get("ready"))
    done = stays or (bool(ended) and ended.get("exitCode") == 0)
    reason, message = ("", "") if done else _trouble(statuses[0] if statuses else {}, status)
    return Fetcher(
        uid=str(pod["metadata"].get("uid")), done=done, running="running" in state,
        model=arguments[1].rsplit("/", 1)[-1] if len(arguments) > 1 else "",
        reason=reason, message=message, metrics=_target(pod) if "running" in state else None,
    )  # fmt: skip


def _target(pod: JSON) -> Target | None:
    """Where it tells how far it is: in an init container, so while the pod itself is Pending."""
    address = str(cast(JSON, pod.get("status") or {}).get("podIP") or "")
    host = f"[{address}]" if ":" in address else address
    return Target(str(pod["metadata"].get("uid")), f"http://{host}:{PORT}/metrics") if address else None


def _trouble(container: JSON, status: JSON) -> tuple[str, str]:
    """A try that failed says why; so do a Secret or claim that is missing, and a node that has no room."""
    waiting = cast(JSON, cast(JSON, container.get("state") or {}).get("waiting") or {})
    for state in ("state", "lastState"):
        ended = cast(JSON, cast(JSON, container.get(state) or {}).get("terminated") or {})
        if ended and ended.get("exitCode"):
            return words_of(ended) or ("FetchFailed", f"the fetcher ended with exit code {ended['exitCode']}")
    if waiting.get("reason") not in (None, "", "ContainerCreating", "PodInitializing"):
        return str(waiting["reason"]), str(waiting.get("message") or "the container does not start")
    for condition in cast("list[JSON]", status.get("conditions") or []):
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return "Unschedulable", str(condition.get("message") or "no node has room for the pod that fetches")
    return "", ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """How far a service's model is."""

    state: Literal["Fetched", "Fetching", "Failed", "Waiting"]
    reason: str
    message: str

    @property
    def done(self) -> bool:
        return self.state == "Fetched"


FETCHED = Fetch("Fetched", "Fetched", "The model's files are there.")


@dataclass(frozen=True, slots=True)
class Bytes:
    """How far a fetch is."""

    done: float
    total: float
    per_s: float


def judge(fetchers: Sequence[Fetcher], progress: Bytes | None, *, complete: bool) -> Fetch:
    """What all that fetch the model say together. complete: the Job has ended well, or every node has its copy."""
    if complete or (fetchers and all(one.done for one in fetchers)):
        return FETCHED
    failed = next((one for one in fetchers if one.reason), None)
    if failed is not None:
        return Fetch("Failed", failed.reason, failed.message)
    if progress is not None and progress.total:
        # In steps of 5 %, so that the status is not written with every scrape.
        step = int(min(1.0, progress.done / progress.total) * 20) * 5
        rate = f", {told(progress.per_s)}/s" if progress.per_s else ""
        return Fetch("Fetching", "Fetching", f"{step} % of {told(progress.total)}{rate}")
    if any(one.running for one in fetchers):
        return Fetch("Fetching", "Fetching", "The source is asked for the model's files.")
    return Fetch("Waiting", "Waiting", "The pod that fetches the model has not started.")


def progress_of(history: History | None, now: float) -> Bytes | None:
    """From a fetcher's metrics; the rate is that of the last half minute."""
    window = history.window(now - 30.0) if history else None
    if window is None:
        return None
    done, total = window.last(BYTES), window.last(TOTAL_BYTES)
    if done is None or total is None:
        return None
    return Bytes(done, total, window.rise(BYTES) / window.span_s if window.span_s > 0 else 0.0)
