"""Spec → objects."""

from __future__ import annotations

import json

import pytest

from mainsail_operator import objects
from mainsail_operator.settings import Settings


def container(manifest):
    return next(c for c in manifest["spec"]["template"]["spec"]["containers"] if c["name"] == "engine")


def test_arguments_follow_the_spec(owner, make_spec) -> None:
    spec = make_spec(
        model={"uri": "pvc://models/dir/m.gguf", "servedNames": ["a", "b"]},
        engine={"maxModelLen": 1024, "kvCache": {"blocks": 64, "prefixCaching": False}, "extraArgs": ["--x=1"]},
        drain={"timeout": "2m"},
    )
    line = " ".join(objects.arguments(owner, spec))
    assert line.startswith("serve --model /models/dir/m.gguf --served-model-name a b ")
    for part in ("--max-model-len 1024", "--kv-cache-blocks 64", "--no-enable-prefix-caching", "--drain-timeout 120"):
        assert part in line
    assert "--max-num-batched-tokens" not in line, "the engine's own default depends on the device"
    assert line.endswith("--x=1")


def test_adapters_are_fetched_or_mounted_and_named(owner, make_spec, settings) -> None:
    spec = make_spec(
        adapters=[
            {"name": "sql", "uri": "hf://org/sql", "secretRef": {"name": "hub"}},
            {"name": "pirate", "uri": "pvc://claim/a/pirate"},
            {"name": "poet", "uri": "file:///opt/poet"},
        ]
    )
    pod = objects.deployment(owner, spec, 1, settings)["spec"]["template"]["spec"]
    (engine,), (fetch,) = pod["containers"], pod["initContainers"]
    line = " ".join(engine["args"])
    assert "--lora-modules sql=/adapters/0 pirate=/adapters-1/a/pirate poet=/opt/poet" in line
    assert fetch["name"] == "fetch-adapter-0"
    assert fetch["args"] == ["hf://org/sql", "/adapters/0"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "hub"}}]
    for one in (engine, fetch):
        mounted = {mount["name"] for mount in one["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}
    assert {"name": "adapters", "mountPath": "/adapters"} in fetch["volumeMounts"]
    assert {"name": "adapters", "mountPath": "/adapters", "readOnly": True} in engine["volumeMounts"]
    assert {"name": "adapters-1", "mountPath": "/adapters-1", "readOnly": True} in engine["volumeMounts"]
    assert objects.revision_of(spec) != objects.revision_of(make_spec())
    assert objects.revision_of(make_spec(adapters=[])) == objects.revision_of(make_spec())


def test_engines_tell_the_gateway_what_they_have_cached(owner, make_spec, settings) -> None:
    engine = container(objects.deployment(owner, make_spec(), 1, settings))
    flags = dict(zip(engine["args"], engine["args"][1:], strict=False))
    told = json.loads(flags["--kv-events-config"])
    ports = {port["name"]: port["containerPort"] for port in engine["ports"]}
    assert told["endpoint"] == f"tcp://*:{ports['kv-events']}"
    assert told["replay_endpoint"] == f"tcp://*:{ports['kv-replay']}"
    named = {port["name"]: port["targetPort"] for port in objects.endpoints(owner)["spec"]["ports"]}
    assert named == {"http": "http", "kv-events": "kv-events", "kv-replay": "kv-replay"}
    (rule,) = objects.network_policy(owner, settings)["spec"]["ingress"]
    assert {"kv-events", "kv-replay"} <= {port["port"] for port in rule["ports"]}
    without = make_spec(engine={"kvCache": {"prefixCaching": False}})
    assert "--kv-events-config" not in objects.arguments(owner, without)


def test_served_name_defaults_to_the_name(owner, make_spec) -> None:
    assert "--served-model-name demo" in " ".join(objects.arguments(owner, make_spec()))


def test_file_source_mounts_nothing(owner, make_spec, settings) -> None:
    spec = make_spec(model={"uri": "file:///opt/model"})
    pod = objects.deployment(owner, spec, 1, settings)["spec"]["template"]["spec"]
    assert {volume["name"] for volume in pod["volumes"]} == {"tmp", "shm"}
    assert "/opt/model" in pod["containers"][0]["args"]


def test_pod_passes_the_restricted_standard(owner, make_spec, settings) -> None:
    pod = objects.deployment(owner, make_spec(), 1, settings)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    context = pod["containers"][0]["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_grace_period_is_above_pre_stop_and_drain(owner, make_spec, settings) -> None:
    manifest = objects.deployment(owner, make_spec(drain={"timeout": "1h"}), 1, settings)
    pod = manifest["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 3600 + objects.PRE_STOP_S
    assert container(manifest)["lifecycle"]["preStop"]["sleep"]["seconds"] == objects.PRE_STOP_S


def test_a_gpu_unless_resources_say_otherwise(owner, make_spec, settings) -> None:
    assert container(objects.deployment(owner, make_spec(), 1, settings))["resources"] == {
        "limits": {"nvidia.com/gpu": "1"}
    }
    two = objects.deployment(owner, make_spec(engine={"tensorParallelSize": 2}), 1, settings)
    assert container(two)["resources"] == {"limits": {"nvidia.com/gpu": "2"}}
    cpu = make_spec(resources={"requests": {"cpu": "1"}})
    assert container(objects.deployment(owner, cpu, 1, settings))["resources"] == {"requests": {"cpu": "1"}}


def test_ranks_and_host_memory_reach_the_command_line(owner, make_spec, settings) -> None:
    spec = make_spec(engine={"tensorParallelSize": 4, "kvCache": {"hostMemory": "1536Mi"}})
    engine = container(objects.deployment(owner, spec, 1, settings))
    flags = dict(zip(engine["args"], engine["args"][1:], strict=False))
    assert flags["--tensor-parallel-size"] == "4"
    assert flags["--kv-offloading-size"] == "1.5"
    assert {"name": "NCCL_SOCKET_IFNAME", "value": "lo"} in engine["env"]
    plain = container(objects.deployment(owner, make_spec(), 1, settings))
    assert "--tensor-parallel-size" not in plain["args"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"replicas": 7}, True),
        ({"rollout": {"progressDeadline": "1h"}}, True),
        ({"engine": {"maxNumSeqs": 256}}, True),
        ({"engine": {"maxNumSeqs": 8}}, False),
        ({"podTemplate": {"spec": {"nodeSelector": {"a": "b"}}}}, False),
        ({"drain": {"timeout": "30s"}}, False),
    ],
)
def test_the_revision_is_what_changes_the_pod(make_spec, change, same: bool) -> None:
    assert (objects.revision_of(make_spec(**change)) == objects.revision_of(make_spec())) is same


def test_quantization_reaches_the_command_line_where_it_is_asked_for(owner, make_spec, settings) -> None:
    """And not else: what a service had before the fields were there must stay the same revision."""
    plain = container(objects.deployment(owner, make_spec(), 1, settings))
    assert not {"--quantization", "--kv-cache-dtype"} & set(plain["args"])
    spec = make_spec(engine={"quantization": "fp8", "kvCache": {"dtype": "fp8"}})
    found = container(objects.deployment(owner, spec, 1, settings))["args"]
    assert found[found.index("--quantization") + 1] == found[found.index("--kv-cache-dtype") + 1] == "fp8"


def test_pod_template_merges_as_kubernetes_does(owner, make_spec, settings) -> None:
    spec = make_spec(
        podTemplate={
            "metadata": {"labels": {"team": "a"}, "annotations": {"x": "y"}},
            "spec": {
                "containers": [
                    {"name": "engine", "image": "mine:2",
                     "env": [{"name": "HOME", "value": "/h"}, {"name": "A", "value": "1"}],
                     "volumeMounts": [{"name": "more", "mountPath": "/more"}]},
                    {"name": "sidecar", "image": "s:1"},
                ],
                "volumes": [{"name": "more", "emptyDir": {}}],
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "securityContext": {"runAsUser": 1000},
            },
        }
    )  # fmt: skip
    template = objects.deployment(owner, spec, 1, settings)["spec"]["template"]
    pod = template["spec"]
    engine, sidecar = pod["containers"]
    assert (engine["image"], sidecar["name"]) == ("mine:2", "sidecar")
    assert {e["name"]: e["value"] for e in engine["env"]} == {"HOME": "/h", "A": "1"}
    assert {m["mountPath"] for m in engine["volumeMounts"]} == {"/tmp", "/dev/shm", "/models", "/more"}
    assert engine["command"] == ["mainsail-engine"]
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["tolerations"][-1] == {"key": "gpu", "operator": "Exists"}
    assert {t["tolerationSeconds"] for t in pod["tolerations"][:-1]} == {20}
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["labels"][objects.SERVICE_LABEL] == "demo"


def test_everything_is_owned(owner, make_spec, settings) -> None:
    for manifest in (
        *objects.children(owner, settings),
        objects.deployment(owner, make_spec(), 1, settings),
    ):
        (reference,) = manifest["metadata"]["ownerReferences"]
        assert reference["uid"] == "uid-1"
        assert reference["controller"] is True
        assert objects.digest_of(manifest)


def test_only_the_gateway_and_scrapers_reach_engines(owner) -> None:
    settings = Settings(namespace="system", metrics_namespaces=("monitoring",))
    spec = objects.network_policy(owner, settings)["spec"]
    assert spec["podSelector"]["matchLabels"] == {"mainsail.dev/service": "demo"}
    (rule,) = spec["ingress"]
    ours, scraper = rule["from"]
    assert ours["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "system"}
    assert ours["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "mainsail"}
    assert scraper == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    kinds = {m["kind"] for m in objects.children(owner, Settings(network_policy=False))}
    assert "NetworkPolicy" not in kinds


def test_the_name_leads_to_the_gateway_and_the_endpoints_to_the_pods(owner) -> None:
    front, endpoints = objects.front(owner, Settings(namespace="system")), objects.endpoints(owner)
    assert front["metadata"]["name"] == "demo"
    assert front["spec"]["externalName"] == "mainsail-gateway.system.svc.cluster.local"
    assert "selector" not in front["spec"]
    assert endpoints["metadata"]["name"] == "demo-engines"
    assert endpoints["metadata"]["labels"]["mainsail.dev/service"] == "demo"
    assert endpoints["spec"]["selector"] == {"mainsail.dev/service": "demo"}


def test_a_node_drain_takes_one_replica_at_a_time_and_never_hangs_on_a_broken_one(owner) -> None:
    spec = objects.disruption_budget(owner)["spec"]
    assert spec["maxUnavailable"] == 1
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
