"""Fetched models: the objects that bring them, and what is read of how far they are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mainsail_operator import fetching, objects
from mainsail_operator.fetched import FETCHED, Bytes, Fetch, Fetcher, Filler, judge, read_fetcher, read_filler
from mainsail_operator.handlers import Store
from mainsail_operator.objects import Owner
from mainsail_operator.observe import Observed
from mainsail_operator.plan import Apply, plan
from mainsail_operator.rollout import Situation, decide
from mainsail_operator.status import status
from mainsail_operator.types import InferenceServiceSpec

SAID = json.dumps({"reason": "CredentialsRefused", "message": "put a token"})


def spec(uri: str = "hf://org/name", **more) -> InferenceServiceSpec:
    podTemplate = more.pop("podTemplate", {})
    return InferenceServiceSpec.model_validate({"model": {"uri": uri, **more}, "podTemplate": podTemplate})


def test_paths_and_names_follow_the_model_alone() -> None:
    assert fetching.model_path(spec()).startswith("/models/org-name-")
    assert fetching.model_path(spec("hf://org/name/q/m.gguf")).endswith("/m.gguf")
    assert fetching.copy_name(spec()) == fetching.copy_name(spec(secretRef={"name": "s"}))
    assert fetching.copy_name(spec()) != fetching.copy_name(spec(revision="v2"))
    assert not fetching.is_fetched(spec("pvc://claim/x"))


def test_a_name_that_is_long_leaves_room_for_the_label_of_the_pods(settings) -> None:
    """Two services whose names begin alike have fetchers of their own."""
    names: set[str] = set()
    for name in ("a" * 46, "a" * 47, "a" * 50, "a" * 49 + "b"):
        job = objects.filler(Owner(name, "ns", "uid"), spec(cache={"claim": "c"}), settings)
        assert job is not None
        names.add(job["metadata"]["name"])
    assert len(names) == 4
    assert {len(name) for name in names} == {63}


def test_volumes() -> None:
    assert fetching.volume(spec())["emptyDir"] == {}
    assert fetching.volume(spec(cache={"claim": "c"}))["persistentVolumeClaim"] == {"claimName": "c"}
    assert fetching.volume(spec(cache={"nodePath": "/var/m"}))["hostPath"]["path"] == "/var/m"


def test_the_secret_is_seen_by_the_fetcher_only(settings) -> None:
    found = fetching.container(spec(secretRef={"name": "hf"}), settings)
    assert found["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert found["securityContext"]["readOnlyRootFilesystem"] is True
    assert found["args"][:2] == ["hf://org/name", fetching.model_path(spec())]
    assert "envFrom" not in fetching.container(spec(), settings)


def test_what_a_user_gives_the_fetcher(settings) -> None:
    template = {
        "spec": {
            "initContainers": [{"name": "fetch", "env": [{"name": "HF_ENDPOINT", "value": "http://mirror"}]}],
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "containers": [{"name": "engine", "env": [{"name": "X", "value": "1"}]}],
        }
    }
    pod = fetching.pod(spec(podTemplate=template), settings, {"restartPolicy": "OnFailure"}, stay=False)
    (container,) = pod["containers"]
    assert {one["name"] for one in container["env"]} == {"HOME", "HF_ENDPOINT"}
    assert pod["tolerations"][0]["key"] == "gpu"
    assert pod["restartPolicy"] == "OnFailure"
    stays = fetching.pod(spec(), settings, {}, stay=True)["containers"][0]
    assert "--stay" in stays["args"]
    assert stays["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_what_a_user_gives_the_container_that_fetches_is_there_wherever_it_runs(owner, settings) -> None:
    """In the Job as in the engine's pod: variables, mounts and the volumes that they name."""
    ca = {"name": "ca", "configMap": {"name": "company-ca"}}
    given = {
        "name": "fetch",
        "env": [{"name": "SSL_CERT_FILE", "value": "/etc/company/ca.pem"}],
        "envFrom": [{"configMapRef": {"name": "proxies"}}],
        "volumeMounts": [{"name": "ca", "mountPath": "/etc/company"}],
    }
    template = {"volumes": [ca, {"name": "of-the-engine", "emptyDir": {}}], "initContainers": [given]}
    asked = spec(secretRef={"name": "hub"}, podTemplate={"spec": template})
    (filler,) = fetching.pod(asked, settings, {}, stay=False)["containers"]
    (before,) = objects.template(owner, asked, settings)["spec"]["initContainers"]
    for container in (filler, before):
        assert container["env"][-1] == given["env"][0]
        assert [one["mountPath"] for one in container["volumeMounts"]] == ["/tmp", "/models", "/etc/company"]
        assert container["envFrom"] == [{"secretRef": {"name": "hub"}}, *given["envFrom"]]
    assert [v["name"] for v in fetching.pod(asked, settings, {}, stay=False)["volumes"]] == ["tmp", "model", "ca"]


def pod(state=None, last=None, *, init: bool = True, ready: bool = False, stay: bool = False, conditions=()):
    kind = "initContainers" if init else "containers"
    status = {"name": "fetch", "state": state or {}, "lastState": last or {}, "ready": ready}
    return {
        "metadata": {"uid": "u"},
        "spec": {kind: [{"name": "fetch", "args": ["hf://org/name", "/models/copy", *(["--stay"] if stay else [])]}]},
        "status": {
            "podIP": "10.0.0.1",
            f"{'initContainer' if init else 'container'}Statuses": [status],
            "conditions": list(conditions),
        },
    }


ENDED_WELL = {"terminated": {"exitCode": 0}}
FAILED = {"terminated": {"exitCode": 1, "message": SAID}}


@pytest.mark.parametrize(
    ("found", "done", "reason"),
    [
        (pod(ENDED_WELL), True, ""),
        (pod({"running": {}}, init=False, ready=True, stay=True), True, ""),
        (pod({"running": {}}, init=False, ready=True), False, ""),
        (pod({"running": {}}), False, ""),
        (pod(FAILED), False, "CredentialsRefused"),
        (pod({"waiting": {"reason": "CrashLoopBackOff"}}, FAILED), False, "CredentialsRefused"),
        (pod({"running": {}}, FAILED), False, "CredentialsRefused"),
        (pod({"terminated": {"exitCode": 137}}), False, "FetchFailed"),
        (pod({"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}}), False,
         "CreateContainerConfigError"),
        (pod({"waiting": {"reason": "PodInitializing"}}), False, ""),
        (pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]), False,
         "Unschedulable"),
    ],
)  # fmt: skip
def test_what_a_pod_says_about_its_fetch(found, done: bool, reason: str) -> None:
    fetcher = read_fetcher(found)
    assert fetcher is not None
    assert (fetcher.done, fetcher.reason, fetcher.model) == (done, reason, "copy")


def test_progress_is_scraped_while_it_runs_be_it_before_the_pod_does() -> None:
    running = read_fetcher(pod({"running": {}}))
    assert running is not None
    assert running.metrics is not None
    assert running.metrics.url == "http://10.0.0.1:8002/metrics"
    ended = read_fetcher(pod(ENDED_WELL))
    assert ended is not None
    assert ended.metrics is None
    assert read_fetcher({"metadata": {}, "spec": {"containers": [{"name": "engine"}]}}) is None


def test_fillers() -> None:
    owner = {"ownerReferences": [{"kind": "InferenceService", "uid": "o"}]}
    job = {"metadata": {"name": "j", **owner}, "status": {"succeeded": 1}}
    assert read_filler("Job", job).complete
    assert read_filler("Job", job).owner == "o"
    assert not read_filler("Job", {"metadata": {"name": "j"}}).complete
    nodes = {"observedGeneration": 1, "desiredNumberScheduled": 2, "numberReady": 2}
    daemons = {"metadata": {"name": "d", "generation": 1}, "status": nodes}
    assert read_filler("DaemonSet", daemons).complete
    for change in ({"numberReady": 1}, {"observedGeneration": 0}, {"desiredNumberScheduled": 0}):
        assert not read_filler("DaemonSet", {**daemons, "status": nodes | change}).complete


def test_judgement() -> None:
    fails = Fetcher("u", done=False, running=False, model="m", reason="DiskFull", message="too little")
    runs = Fetcher("v", done=False, running=True, model="m")
    assert judge([runs], Bytes(2e9, 4e9, 85e6), complete=False).message == "50 % of 4.0 GB, 85.0 MB/s"
    assert judge([runs], None, complete=False).state == "Fetching"
    assert judge([], None, complete=False).state == "Waiting"
    assert judge([runs, fails], Bytes(2e9, 4e9, 0), complete=False).reason == "DiskFull"
    assert judge([fails], None, complete=True).done
    assert judge([Fetcher("u", done=True, running=False, model="m")], None, complete=False).done


def test_a_job_fills_a_claim_and_a_daemonset_the_nodes(owner, settings) -> None:
    job = objects.filler(owner, spec(cache={"claim": "c"}, secretRef={"name": "hf"}), settings)
    assert job is not None
    assert (job["kind"], job["spec"]["template"]["spec"]["restartPolicy"]) == ("Job", "OnFailure")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert objects.SERVICE_LABEL not in labels, "Services must not select it"
    assert labels[fetching.LABEL] == owner.name
    nodes = objects.filler(owner, spec(cache={"nodePath": "/var/m"}), settings)
    assert nodes is not None
    assert nodes["kind"] == "DaemonSet"
    chosen = nodes["spec"]["selector"]["matchLabels"]
    assert chosen.items() <= nodes["spec"]["template"]["metadata"]["labels"].items()
    assert objects.filler(owner, spec(), settings) is None
    assert objects.filler(owner, spec("pvc://c/x"), settings) is None


def test_another_image_makes_no_other_job_and_another_secret_does(owner, settings) -> None:
    def name(one: InferenceServiceSpec, fetch_image: str = "a:1") -> str:
        found = objects.filler(owner, one, replace(settings, fetch_image=fetch_image))
        assert found is not None
        return found["metadata"]["name"]

    cached = spec(cache={"claim": "c"})
    assert name(cached) == name(cached, "a:2")
    assert name(cached) != name(spec(cache={"claim": "c"}, secretRef={"name": "s"}))


def test_what_may_make_room_is_said_when_it_is_made_and_makes_no_other_job(owner, settings) -> None:
    def made(one: InferenceServiceSpec, *kept: str, now: float = 0.0):
        found = objects.filler(owner, one, settings, kept, now)
        assert found is not None
        return found["metadata"]["name"], found["spec"]["template"]["spec"]["containers"][0]["args"]

    cached, limited = spec(cache={"claim": "c"}), spec(cache={"claim": "c", "limit": "2Gi"})
    name, arguments = made(limited, "b", "a", now=1000.4)
    assert arguments[-7:] == ["--decided-at", "1000", "--limit", str(2 << 30), "--keep", "a", "--keep", "b"][-7:]
    assert name == made(cached)[0] == made(cached, "c", now=2.0)[0]
    assert objects.revision_of(limited) == objects.revision_of(cached), "another limit restarts nothing"
    engine = objects.deployment(owner, limited, 1, settings)["spec"]["template"]["spec"]
    assert "--decided-at" not in engine["initContainers"][0]["args"], "it would be out of date"


def test_the_copies_in_use_are_those_of_services_and_of_pods() -> None:
    store, model = Store(), {"uri": "hf://org/name", "revision": "v2"}
    for number, body in enumerate(({"model": model}, {"model": {"uri": "pvc://c/x"}})):
        store.services.put({"metadata": {"namespace": "n", "name": str(number), "uid": str(number)}, "spec": body})
    old = pod(ENDED_WELL)
    old["metadata"] |= {"namespace": "n", "name": "p", "labels": {objects.SERVICE_LABEL: "0"}}
    store.fetchers.put(old)
    assert store.copies() == {fetching.copy_name(spec(revision="v2")), "copy"}


def test_the_engine_finds_the_copy(owner, settings) -> None:
    one = spec(cache={"claim": "c"})
    pod = objects.deployment(owner, one, 1, settings)["spec"]["template"]["spec"]
    (fetcher,), (engine,) = pod["initContainers"], pod["containers"]
    assert engine["args"][2] == fetcher["args"][1] == fetching.model_path(one)
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in engine["volumeMounts"]
    assert {"name": "model", "mountPath": "/models"} in fetcher["volumeMounts"]
    assert [v for v in pod["volumes"] if v["name"] == "model"] == [fetching.volume(one)]


def planned(owner, settings, one: InferenceServiceSpec, *fillers: Filler):
    situation = Situation(one.rollout, objects.deployment_name(owner, objects.revision_of(one)), 1, Observed())
    found = plan(owner, one, Observed(), settings, decide(None, situation), {}, fillers).actions
    return [(type(a).__name__, a.manifest["kind"] if isinstance(a, Apply) else a.name) for a in found]


def test_no_pod_before_the_claim_is_filled(owner, settings) -> None:
    one = spec(cache={"claim": "c"})
    manifest = objects.filler(owner, one, settings)
    assert manifest is not None
    name = manifest["metadata"]["name"]
    assert ("Apply", "Job") in planned(owner, settings, one)
    assert ("Apply", "Deployment") not in planned(owner, settings, one)
    running = Filler("Job", name, complete=False, owner=owner.uid)
    assert ("Apply", "Deployment") not in planned(owner, settings, one, running)
    done = planned(owner, settings, one, replace(running, complete=True))
    assert ("Apply", "Deployment") in done
    assert ("Apply", "Job") not in done
    assert ("Apply", "Deployment") in planned(owner, settings, spec(cache={"nodePath": "/m"})), "each node fetches"
    assert ("Apply", "Deployment") in planned(owner, settings, spec())


def test_what_fetched_another_model_goes(owner, settings) -> None:
    old = Filler("Job", "demo-fetch-old", complete=True, owner=owner.uid)
    others = Filler("Job", "theirs", complete=True, owner="somebody")
    actions = planned(owner, settings, spec("pvc://c/x"), old, others)
    assert ("Delete", "demo-fetch-old") in actions
    assert ("Delete", "theirs") not in actions


@pytest.mark.parametrize(
    ("fetch", "expected"),
    [
        (Fetch("Fetching", "Fetching", "50 %"),
         {"Ready": ("False", "FetchingModel"), "ModelFetched": ("False", "Fetching"),
          "Reconciling": ("True", "FetchingModel")}),
        (Fetch("Failed", "DiskFull", "too little"),
         {"Ready": ("False", "DiskFull"), "ModelFetched": ("False", "DiskFull"), "Stalled": ("True", "DiskFull")}),
        (FETCHED, {"Ready": ("False", "Starting"), "ModelFetched": ("True", "Fetched"),
                   "Reconciling": ("True", "WaitingForPods")}),
    ],
)  # fmt: skip
def test_the_conditions_say_how_far_it_is(owner, settings, fetch: Fetch, expected) -> None:
    one = spec(cache={"claim": "c"})
    situation = Situation(one.rollout, objects.deployment_name(owner, objects.revision_of(one)), 1, Observed())
    told = status(owner, one, 1, Observed(), decide(None, situation), [], 0.0, settings=settings, fetch=fetch)
    found = {c.type: (c.status, c.reason) for c in told.conditions}
    assert expected.items() <= found.items()
