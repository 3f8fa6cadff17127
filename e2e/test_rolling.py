"""A changed spec rolls without a failed request; a killed operator goes on; a broken revision harms nobody."""

from __future__ import annotations

import pytest

from e2e.cluster.images import ENGINE_IMAGE
from e2e.kube import HANG_S, Kube, Object, condition, wait_for, wait_still
from e2e.services import pods, service, steady_traffic, wait_ready, wait_routed


@pytest.fixture(scope="module")
def rolling(kube: Kube, gateway_url: str):
    kube.apply(service("rolling"))
    wait_ready(kube, "rolling")
    wait_routed(gateway_url, "rolling")
    yield "rolling"
    kube.delete("mis", "rolling")


def revisions(kube: Kube) -> set[str]:
    return {pod["metadata"]["labels"]["mainsail.dev/revision"] for pod in pods(kube, "rolling")}


def test_spec_change_rolls_without_a_failed_request(kube: Kube, gateway_url: str, rolling) -> None:
    old = revisions(kube)
    with steady_traffic(gateway_url, "rolling") as traffic:
        kube.apply(service("rolling", maxNumSeqs=12))
        wait_ready(kube, "rolling")
        wait_for("only the new revision's pods", lambda: revisions(kube).isdisjoint(old), story=kube.story)
        after = traffic.completed
        wait_for("answers from the new revision", lambda: traffic.completed >= after + 3)
    assert traffic.failures == []


def test_operator_killed_in_the_middle_of_a_roll(kube: Kube, gateway_url: str, rolling) -> None:
    old = revisions(kube)
    with steady_traffic(gateway_url, "rolling") as traffic:
        kube.apply(service("rolling", maxNumSeqs=10))
        wait_for("the new revision's pod", lambda: revisions(kube) - old, story=kube.story)
        kube.run("delete", "pods", "-n", "mainsail-system", "-l", "app.kubernetes.io/component=operator",
                 "--grace-period=0", "--force")  # fmt: skip
        wait_ready(kube, "rolling")
        wait_for("only the new revision's pods", lambda: revisions(kube).isdisjoint(old), story=kube.story)
    assert traffic.failures == []


def test_upgrade_of_the_operator_touches_nothing_that_is_right(kube: Kube, rolling) -> None:
    """Another operator, with another engine image and another pull policy for the pods of new revisions."""
    wait_ready(kube, "rolling")
    selector = "mainsail.dev/service=rolling"
    wait_for("ended pods gone", lambda: len(kube.list("pods", selector=selector)) == 1)

    def objects() -> dict[str, Object]:
        kinds = ("deployments", "services", "serviceaccounts", "pods")
        found = [(kind, obj) for kind in kinds for obj in kube.list(kind, selector=selector)]
        found.append(("mis", kube.get("mis", "rolling") or {}))
        return {f"{kind}/{obj['metadata']['name']}": written_by_an_operator(kind, obj) for kind, obj in found}

    before = wait_still("nothing in motion", objects)
    upgrade_operator(kube, "localhost/mainsail-engine:next", "Always")
    # The new operator is proven awake by a change of its own making: it answers to a new object.
    kube.apply(service("probe", replicas=0))
    wait_for("the operator at work again", lambda: kube.get("service", "probe"))
    kube.delete("mis", "probe")
    wait_for("the probe gone", lambda: not kube.get("mis", "probe"))
    assert wait_still("nothing in motion", objects) == before
    upgrade_operator(kube, ENGINE_IMAGE, "IfNotPresent")


def written_by_an_operator(kind: str, obj: Object) -> Object:
    """What it could have touched: what kubelet and controllers say of a busy machine is not of that."""
    metadata = {key: value for key, value in obj["metadata"].items() if key not in ("resourceVersion", "managedFields")}
    kept = {key: value for key, value in obj.items() if key != "status"} | {"metadata": metadata}
    if kind != "mis":
        return kept
    conditions = [{key: value for key, value in one.items() if key != "lastTransitionTime"}
                  for one in obj["status"]["conditions"]]  # fmt: skip
    return kept | {"status": obj["status"] | {"conditions": conditions}}


def upgrade_operator(kube: Kube, engine_image: str, pull_policy: str) -> None:
    operator = ("deployment/mainsail-operator", "-n", "mainsail-system")
    kube.run("set", "env", *operator, f"MAINSAIL_ENGINE_IMAGE={engine_image}",
             f"MAINSAIL_ENGINE_IMAGE_PULL_POLICY={pull_policy}")  # fmt: skip
    kube.run("rollout", "status", *operator, f"--timeout={HANG_S}s")


def test_missing_model_is_in_the_condition_and_the_old_revision_serves(kube: Kube, gateway_url: str, rolling) -> None:
    with steady_traffic(gateway_url, "rolling", streams=1) as traffic:
        kube.apply(service("rolling", uri="pvc://models/no-such-model.gguf"))
        obj = wait_for(
            "ModelLoaded=False for what is missing",
            lambda: (
                condition(found := kube.get("mis", "rolling"), "ModelLoaded").get("reason") == "ModelNotFound" and found
            ),
            story=kube.story,
        )
        assert condition(obj, "ModelLoaded")["status"] == "False"
        assert "no-such-model.gguf" in condition(obj, "ModelLoaded")["message"]
        assert condition(obj, "Ready")["status"] == "True"
        kube.apply(service("rolling", maxNumSeqs=10))
        wait_ready(kube, "rolling")
    assert traffic.failures == []
