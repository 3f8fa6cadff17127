"""Conditions: stable reasons, the engine's own words, kstatus."""

from __future__ import annotations

from mainsail_operator import objects
from mainsail_operator.objects import revision_of
from mainsail_operator.observe import Observed, Pod, Revision, Trouble
from mainsail_operator.plan import plan
from mainsail_operator.status import invalid, status

NOW = 1_800_000_000.0


def revision(owner, spec, settings, *pods: Pod, **fields) -> Revision:
    manifest = objects.deployment(owner, spec, spec.replicas, settings)
    return Revision(
        revision_of(spec), manifest["metadata"]["name"], spec.replicas, "2026-01-02T00:00:00Z", pods=pods,
        image="engine:1", applied=objects.digest_of(manifest), **fields,
    )  # fmt: skip


def seen(owner, *revisions: Revision) -> Observed:
    applied = {f"{m['kind']}/{owner.name}": objects.digest_of(m)
               for m in (objects.service(owner), objects.service_account(owner))}  # fmt: skip
    return Observed(revisions, applied)


def told(owner, spec, settings, observed, old=()):
    return status(owner, spec, 3, observed, plan(owner, spec, observed, settings, NOW), old, NOW)


def conditions(found) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in found.conditions}


SERVING = Pod("a", serving=True, ending=False, scheduled=True)
LOADING = Pod("b", serving=False, ending=False, scheduled=True)
FAILED = Pod("c", False, False, True, trouble=Trouble("MissingTensor", "no tensor x", load_failure=True))


def test_all_well(owner, make_spec, settings) -> None:
    spec = make_spec()
    found = told(owner, spec, settings, seen(owner, revision(owner, spec, settings, SERVING)))
    assert conditions(found) == {
        "Ready": ("True", "Serving"), "ModelLoaded": ("True", "Loaded"), "RolloutComplete": ("True", "Complete"),
    }  # fmt: skip
    assert (found.replicas, found.serving_replicas, found.observed_generation) == (1, 1, 3)
    assert found.url == "http://demo.default.svc.cluster.local/v1"
    assert found.revisions[0].weight == 100


def test_first_start(owner, make_spec, settings) -> None:
    spec = make_spec()
    found = told(owner, spec, settings, seen(owner, revision(owner, spec, settings, LOADING)))
    assert conditions(found)["Ready"] == ("False", "Starting")
    assert conditions(found)["ModelLoaded"] == ("Unknown", "Loading")
    assert conditions(found)["Reconciling"] == ("True", "Progressing")


def test_a_failed_load_is_told_in_the_engines_words(owner, make_spec, settings) -> None:
    spec = make_spec()
    found = told(owner, spec, settings, seen(owner, revision(owner, spec, settings, FAILED)))
    assert conditions(found)["ModelLoaded"] == ("False", "MissingTensor")
    assert conditions(found)["Ready"] == ("False", "MissingTensor")
    assert conditions(found)["Stalled"] == ("True", "MissingTensor")
    assert "Reconciling" not in conditions(found)
    assert "no tensor x" in next(c.message for c in found.conditions if c.type == "ModelLoaded")


def test_the_old_revision_serves_while_the_new_one_cannot(owner, make_spec, settings) -> None:
    old, new = make_spec(), make_spec(engine={"maxNumSeqs": 3})
    observed = seen(owner, revision(owner, new, settings, FAILED), revision(owner, old, settings, SERVING))
    found = told(owner, new, settings, observed)
    assert conditions(found)["Ready"] == ("True", "Serving")
    assert conditions(found)["ModelLoaded"] == ("False", "MissingTensor")
    assert [r.weight for r in found.revisions] == [0, 100]


def test_deadline(owner, make_spec, settings) -> None:
    spec = make_spec()
    late = revision(owner, spec, settings, LOADING, deadline_exceeded=True)
    assert conditions(told(owner, spec, settings, seen(owner, late)))["Stalled"] == ("True", "ProgressDeadlineExceeded")


def test_scaled_to_zero(owner, make_spec, settings) -> None:
    spec = make_spec(replicas=0)
    found = told(owner, spec, settings, seen(owner, revision(owner, spec, settings)))
    assert conditions(found)["Ready"] == ("False", "ScaledToZero")
    assert "Reconciling" not in conditions(found)


def test_times_stay_while_nothing_changes(owner, make_spec, settings) -> None:
    spec = make_spec()
    observed = seen(owner, revision(owner, spec, settings, SERVING))
    first = told(owner, spec, settings, observed)
    todo = plan(owner, spec, observed, settings, NOW)
    again = status(owner, spec, 3, observed, todo, first.conditions, NOW + 500)
    assert again == first


def test_an_unreadable_spec_touches_nothing(owner) -> None:
    found = invalid(owner, 4, "spec.model: missing", [], NOW)
    assert conditions(found)["Stalled"] == ("True", "InvalidSpec")
    assert found.observed_generation == 4
