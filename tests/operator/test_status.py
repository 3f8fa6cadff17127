"""Conditions: stable reasons, the engine's own words, kstatus."""

from __future__ import annotations

from mainsail_operator.events import events
from mainsail_operator.objects import deployment_name, revision_of
from mainsail_operator.observe import Observed, Pod, Revision, Trouble
from mainsail_operator.rollout import Situation, decide
from mainsail_operator.settings import Settings
from mainsail_operator.status import invalid, status
from mainsail_operator.types import InferenceServiceStatus

NOW = 1_800_000_000.0


def revision(owner, spec, *pods: Pod, **fields) -> Revision:
    name = deployment_name(owner, revision_of(spec))
    return Revision(revision_of(spec), name, spec.replicas, "2026-01-02T00:00:00Z", pods=pods, **fields)


def told(owner, spec, *revisions: Revision, before: InferenceServiceStatus | None = None, now: float = NOW, **more):
    """The status after passes until the rollout rests."""
    found = before or InferenceServiceStatus()
    for _ in range(3):
        it = Situation(spec=spec.rollout, target=deployment_name(owner, revision_of(spec)), desired=spec.replicas,
                       observed=Observed(revisions), now=now)  # fmt: skip
        found = status(
            owner, spec, 3, Observed(revisions), decide(found.rollout, it), found.conditions, now,
            **{"settings": Settings(), **more},
        )  # fmt: skip
    return found


def conditions(found) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in found.conditions}


SERVING = Pod("a", serving=True, ending=False, scheduled=True)
LOADING = Pod("b", serving=False, ending=False, scheduled=True)
FAILED = Pod("c", False, False, True, trouble=Trouble("MissingTensor", "no tensor x", load_failure=True, told=True))


def test_all_well(owner, make_spec) -> None:
    spec = make_spec()
    found = told(owner, spec, revision(owner, spec, SERVING))
    assert conditions(found) == {
        "Ready": ("True", "Serving"), "ModelLoaded": ("True", "Loaded"), "RolloutComplete": ("True", "Complete"),
    }  # fmt: skip
    assert (found.replicas, found.serving_replicas, found.observed_generation) == (1, 1, 3)
    assert found.url == "http://demo.default.svc.cluster.local/v1"
    assert found.revisions[0].weight == 100


def test_a_service_that_grew_says_what_keeps_the_others(owner, make_spec) -> None:
    """Ready all the while: without these words nobody would know why it goes on reconciling."""
    spec = make_spec(replicas=2)
    before = told(owner, make_spec(), revision(owner, make_spec(), SERVING))
    unplaced = Pod("d", False, False, False, unschedulable_since=NOW, trouble=Trouble("Unschedulable", "no GPU"))

    def message(*pods: Pod, **fields) -> str:
        found = told(owner, spec, revision(owner, spec, *pods, **fields), before=before)
        assert conditions(found)["Ready"] == ("True", "Serving")
        assert found.rollout is not None
        assert "All replicas" not in found.rollout.message
        (moving,) = (c for c in found.conditions if c.type == "Reconciling")
        return moving.message

    assert message(SERVING, unplaced) == "1 of 2 replicas serve. Unschedulable: no GPU"
    assert message(SERVING, refusal="exceeded quota") == (
        "1 of 2 replicas serve. The API server refuses further pods: exceeded quota"
    )
    assert message(SERVING, LOADING) == "1 of 2 replicas serve."


def test_the_url_is_the_gateways(owner, make_spec) -> None:
    spec = make_spec()

    def url(settings: Settings) -> str:
        return told(owner, spec, revision(owner, spec, SERVING), settings=settings).url

    assert url(Settings(gateway_port=8080)) == "http://demo.default.svc.cluster.local:8080/v1"
    assert url(Settings(gateway_tls=True, gateway_port=443)) == "https://demo.default.svc.cluster.local/v1"
    assert url(Settings(gateway_tls=True)) == "https://demo.default.svc.cluster.local:80/v1"


def test_first_start(owner, make_spec) -> None:
    spec = make_spec()
    found = told(owner, spec, revision(owner, spec, LOADING))
    assert conditions(found)["Ready"] == ("False", "Starting")
    assert conditions(found)["ModelLoaded"] == ("Unknown", "Loading")
    assert conditions(found)["Reconciling"] == ("True", "WaitingForPods")


def test_a_failed_load_is_told_in_the_engines_words(owner, make_spec) -> None:
    spec = make_spec()
    found = told(owner, spec, revision(owner, spec, FAILED))
    assert conditions(found)["ModelLoaded"] == ("False", "MissingTensor")
    assert conditions(found)["Ready"] == ("False", "MissingTensor")
    assert conditions(found)["Stalled"] == ("True", "MissingTensor")
    assert "Reconciling" not in conditions(found)
    assert "no tensor x" in next(c.message for c in found.conditions if c.type == "ModelLoaded")


def test_the_old_revision_serves_while_the_new_one_cannot(owner, make_spec) -> None:
    old, new = make_spec(), make_spec(engine={"maxNumSeqs": 3})
    before = told(owner, old, revision(owner, old, SERVING))
    found = told(owner, new, revision(owner, new, FAILED), revision(owner, old, SERVING), before=before)
    assert found.rollout is not None
    assert (found.rollout.phase, found.rollout.reason) == ("RollingBack", "MissingTensor")
    assert conditions(found)["Ready"] == ("True", "Serving")
    assert conditions(found)["ModelLoaded"] == ("False", "MissingTensor")
    assert conditions(found)["Reconciling"] == ("True", "RollingBack")
    assert [r.weight for r in found.revisions] == [0, 100]
    after = told(owner, new, revision(owner, old, SERVING), before=found)
    assert conditions(after)["Stalled"] == ("True", "MissingTensor")
    assert conditions(after)["ModelLoaded"] == ("False", "MissingTensor")
    assert "no tensor x" in next(c.message for c in after.conditions if c.type == "ModelLoaded")


def test_deadline(owner, make_spec) -> None:
    spec = make_spec()
    before = told(owner, spec, revision(owner, spec, LOADING))
    late = told(owner, spec, revision(owner, spec, LOADING), before=before, now=NOW + 16 * 60)
    assert conditions(late)["Stalled"] == ("True", "ProgressDeadlineExceeded")


def test_scaled_to_zero(owner, make_spec) -> None:
    spec = make_spec(replicas=0)
    found = told(owner, spec, revision(owner, spec))
    assert conditions(found)["Ready"] == ("True", "ScaledToZero"), "as a Deployment of no replicas is Available"
    assert {"Reconciling", "Stalled"}.isdisjoint(conditions(found))


def test_pods_that_the_api_server_refuses_are_told(owner, make_spec) -> None:
    spec, quota = make_spec(), 'pods "demo-1" is forbidden: exceeded quota: gpus'
    found = told(owner, spec, revision(owner, spec, refusal=quota))
    for kind in ("Ready", "Stalled"):
        assert conditions(found)[kind][1] == "PodsRefused"
    assert all(quota in c.message for c in found.conditions if c.type in ("Ready", "Stalled"))


def test_a_refused_write_is_told(owner, make_spec) -> None:
    spec = make_spec()
    found = told(owner, spec, revision(owner, spec, SERVING), refusal="Service default/demo exists")
    assert conditions(found)["Stalled"] == ("True", "WriteRefused")
    assert [e.reason for e in events(told(owner, spec, revision(owner, spec, SERVING)), found)] == ["WriteRefused"]


def test_a_paused_service_says_so(owner, make_spec) -> None:
    spec = make_spec()
    found = told(owner, spec, revision(owner, spec, SERVING), paused=True)
    assert conditions(found)["Reconciling"] == ("True", "Paused")


def test_times_stay_while_nothing_changes(owner, make_spec) -> None:
    spec = make_spec()
    first = told(owner, spec, revision(owner, spec, SERVING))
    again = told(owner, spec, revision(owner, spec, SERVING), before=first, now=NOW + 500)
    assert again == first
    assert events(first, again) == []


def test_events_tell_the_turns_of_a_rollout(owner, make_spec) -> None:
    spec = make_spec()
    loading = told(owner, spec, revision(owner, spec, LOADING))
    serving = told(owner, spec, revision(owner, spec, SERVING), before=loading)
    assert [e.reason for e in events(InferenceServiceStatus(), loading)] == ["RolloutStarted"]
    assert [e.reason for e in events(loading, serving)] == ["RolloutComplete"]


def test_an_unreadable_spec_touches_nothing(owner, make_spec) -> None:
    spec = make_spec()
    before = told(owner, spec, revision(owner, spec, SERVING))
    found = invalid(owner, 4, "spec.model: missing", before, NOW, Settings())
    assert conditions(found)["Stalled"] == ("True", "InvalidSpec")
    assert found.observed_generation == 4
    assert (found.revisions, found.rollout) == (before.revisions, before.rollout), "the gateway routes on"


ADAPTED = {"adapters": [{"name": "sql", "uri": "hf://org/sql"}, {"name": "poet", "uri": "pvc://adapters/poet"}]}
REFUSED = Trouble("CredentialsRefused", "adapter hf://org/sql: the hub refuses the token", adapter=True)
TOO_LARGE = Trouble("InvalidAdapter", "adapter 'poet' has rank 64; --max-lora-rank is 16", True, True, adapter=True)


def adapters(found) -> tuple[str, str, str]:
    return next((c.status, c.reason, c.message) for c in found.conditions if c.type == "AdaptersLoaded")


def test_an_adapter_that_cannot_be_fetched_has_a_condition_of_its_own(owner, make_spec) -> None:
    spec = make_spec(**ADAPTED)
    found = told(owner, spec, revision(owner, spec, Pod("a", False, False, True, trouble=REFUSED)))
    assert adapters(found)[:2] == ("False", "CredentialsRefused")
    assert "pod a: adapter hf://org/sql" in adapters(found)[2]
    assert conditions(found)["Stalled"] == ("True", "CredentialsRefused")
    assert conditions(found)["ModelLoaded"] == ("Unknown", "CredentialsRefused")
    mended = told(owner, spec, revision(owner, spec, SERVING), before=found)
    assert adapters(mended) == ("True", "Loaded", f"Revision {revision(owner, spec).name} serves 2 adapters.")
    assert "Stalled" not in conditions(mended)


def test_an_adapter_that_the_engine_refuses_is_told_while_it_goes_back(owner, make_spec) -> None:
    old, new = make_spec(), make_spec(**ADAPTED)
    before = told(owner, old, revision(owner, old, SERVING))
    assert "AdaptersLoaded" not in conditions(before)
    failed = revision(owner, new, Pod("a", False, False, True, trouble=TOO_LARGE))
    found = told(owner, new, failed, revision(owner, old, SERVING), before=before)
    assert adapters(found)[:2] == ("False", "InvalidAdapter")
    gone = told(owner, new, revision(owner, old, SERVING), before=found)
    assert adapters(gone)[:2] == ("False", "InvalidAdapter")
    assert "rank 64" in adapters(gone)[2]


def test_one_replica_without_its_adapter_is_told_beside_others(owner, make_spec) -> None:
    spec = make_spec(**ADAPTED, replicas=2)
    found = told(owner, spec, revision(owner, spec, SERVING, Pod("b", False, False, True, trouble=REFUSED)))
    assert adapters(found)[:2] == ("False", "CredentialsRefused")
    assert conditions(found)["Ready"] == ("True", "Serving")
