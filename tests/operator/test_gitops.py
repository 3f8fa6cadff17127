"""What pipelines make of a service, over whole lives of services: kstatus' rules, Argo CD's Lua, Flux' CEL.

The lives are those of the simulated cluster: every status that the operator would have written on the way. Beside them
stands `recorded_statuses.jsonl`: one of every kind that `kubectl get mis -A --watch` saw while all of `e2e/` ran.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cel
import lupa
import pytest
import yaml
from tests.operator.simulation import Cluster, name_of, settled, spec_of
from tests.operator.test_rollout import OF, STRATEGIES

from mainsail_operator.types import InferenceService

GITOPS = Path(__file__).parents[2] / "docs/gitops"
HEALTH = (GITOPS / "argocd/health.lua").read_text()
FLUX = yaml.safe_load((GITOPS / "flux/kustomization.yaml").read_text())["spec"]["healthCheckExprs"][0]


def kstatus(obj: dict[str, Any]) -> str:
    """The rules of kstatus for a custom resource, as its README states them."""
    if obj["metadata"].get("deletionTimestamp"):
        return "Terminating"
    status = obj.get("status", {})
    if "observedGeneration" in status and status["observedGeneration"] != obj["metadata"]["generation"]:
        return "InProgress"
    conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    return "InProgress" if conditions.get("Ready", "True") != "True" else "Current"


def argo(obj: dict[str, Any]) -> str:
    lua = lupa.LuaRuntime(unpack_returned_tuples=True)

    def table(value: Any) -> Any:
        if isinstance(value, dict):
            return lua.table_from({key: table(item) for key, item in value.items()})
        if isinstance(value, list):
            return lua.table_from([table(item) for item in value])
        return value

    judge: Any = lua.eval(f"function(obj)\n{HEALTH}\nend")
    health = judge(table(obj))
    assert health["message"]
    return str(health["status"])


def flux(obj: dict[str, Any]) -> str:
    """Exactly one of the expressions holds."""
    context = {"metadata": obj["metadata"], "status": obj.get("status", {})}
    found = [name for name in ("inProgress", "failed", "current") if cel.evaluate(FLUX[name], context)]
    assert len(found) == 1, found
    return found[0]


ARGO = {"InProgress": {"Progressing", "Suspended"}, "Failed": {"Degraded"}, "Current": {"Healthy"}}
FLUX_OF = {"InProgress": "inProgress", "Failed": "failed", "Current": "current"}


def agreed(obj: dict[str, Any]) -> str:
    """What kstatus says; the others must agree."""
    found = kstatus(obj)
    assert argo(obj) in ARGO[found]
    assert flux(obj) == FLUX_OF[found]
    return found


def told(cluster: Cluster, generation: int = 1) -> str:
    """What is made of what is written."""
    status = cluster.written.model_dump(mode="json", by_alias=True, exclude_none=True)
    return agreed({"metadata": {"name": "demo", "generation": generation}, "status": status})


def test_every_status_that_a_real_cluster_has_seen() -> None:
    lines = (Path(__file__).parent / "recorded_statuses.jsonl").read_text().splitlines()
    found = Counter(agreed(obj) for obj in map(json.loads, lines))
    assert found.keys() == {"InProgress", "Failed", "Current"}
    assert sum(found.values()) > 20
    for obj in map(json.loads, lines):
        conditions = {c["type"]: c["status"] for c in obj["status"]["conditions"]}
        moving = {conditions.get("Reconciling"), conditions.get("Stalled")}
        assert moving != {"True"}, "either it moves or it is stuck"
        assert len(conditions) == len(obj["status"]["conditions"])


def life(cluster: Cluster, spec: Any, ticks: int = 90) -> list[str]:
    """The story, each chapter once."""
    story: list[str] = []
    for _ in range(ticks):
        cluster.pass_over(spec)
        cluster.advance()
        if not story or story[-1] != told(cluster):
            story.append(told(cluster))
    return story


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_good_change_is_in_progress_and_then_current(strategy: str) -> None:
    cluster, _ = settled(1, 3, 8)
    assert told(cluster) == "Current"
    assert life(cluster, spec_of(2, 3, **OF[strategy])) == ["InProgress", "Current"]


@pytest.mark.parametrize("like", ["broken", "stuck", "failing"])
def test_a_bad_change_fails_and_reverting_it_is_current_again(like: str) -> None:
    cluster, old = settled(1, 3, 8)
    new = spec_of(2, 3, **OF["Canary"])
    cluster.like[name_of(new)] = like
    assert life(cluster, new) == ["InProgress", "Failed"]
    assert life(cluster, old)[-1] == "Current"


def test_the_first_start_and_one_that_cannot() -> None:
    assert life(Cluster(4), spec_of(1, 2)) == ["InProgress", "Current"]
    cluster = Cluster(4)
    cluster.like[name_of(spec_of(1, 2))] = "broken"
    assert life(cluster, spec_of(1, 2)) == ["InProgress", "Failed"]


def test_zero_replicas_are_what_was_asked_for() -> None:
    cluster, _ = settled(1, 2, 4)
    assert life(cluster, spec_of(1, 0))[-1] == "Current"


def test_a_spec_that_was_not_looked_at_is_in_progress() -> None:
    cluster, _ = settled(1, 2, 4)
    assert told(cluster, generation=2) == "InProgress"


def test_an_object_without_a_status_is_not_healthy() -> None:
    """kstatus itself takes it for current, which is why Argo CD and Flux get rules of their own."""
    obj = {"metadata": {"name": "demo", "generation": 1}}
    assert argo(obj) == "Progressing"
    assert flux(obj) == "inProgress"


def test_paused_is_suspended() -> None:
    cluster, _ = settled(1, 2, 8)
    cluster.command = "pause"
    new = spec_of(2, 2, **OF["Canary"])
    for _ in range(10):
        cluster.pass_over(new)
        cluster.advance()
    status = cluster.written.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert argo({"metadata": {"generation": 1}, "status": status}) == "Suspended"


@pytest.mark.parametrize("path", sorted(GITOPS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(GITOPS)))
def test_the_documents_are_what_they_say(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert {"apiVersion", "kind"} <= document.keys()
        if document["kind"] == "InferenceService" and "base" in str(path):
            InferenceService.model_validate({"spec": document["spec"]})
