"""A model that is fetched from a hub, a bucket, a registry: to a claim by a Job, to the node by a DaemonSet.

What is wrong is told in time, and what nobody uses any more makes room.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from e2e import hub, stores, tiny
from e2e.cluster.network import NODE
from e2e.cluster.place import Place
from e2e.kube import HANG_S, Kube, Object, condition, wait_for
from e2e.services import client, pods, service, wait_ready, wait_routed

URI = f"hf://{hub.REPOSITORY}"
NODES = "nodes"
"""A namespace that allows hostPath volumes, which `default` of the rig, being restricted, does not."""


def volume(folder: Path) -> list[Object]:
    """A folder of the node as a claim `cache` that every pod may write."""
    mode = {"accessModes": ["ReadWriteMany"], "storageClassName": "mainsail-cache"}
    on_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "mainsail-cache"},
         "spec": {**mode, "capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain",
                  "local": {"path": str(folder)},
                  "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": "cache",
                               "namespace": "default"},
                  "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [on_node]}]}}}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "cache", "namespace": "default"},
         "spec": {**mode, "volumeName": "mainsail-cache", "resources": {"requests": {"storage": "1Gi"}}}},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folders(cluster: Place, kube: Kube) -> Iterator[tuple[Path, Path]]:
    """The claim's folder and a folder of the node, both empty and writable for the fetcher's user; and a hub."""
    tiny.write(cluster.models / "tiny")
    found = cluster.state / "fetch-claim", cluster.state / "fetch-node"
    for folder in found:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
    privileged = {"pod-security.kubernetes.io/enforce": "privileged"}
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NODES, "labels": privileged}})
    kube.apply(*hub.objects(), *volume(found[0]))
    kube.run("wait", "--for=condition=Ready", "pod/hub", f"--timeout={HANG_S}s")
    yield found
    kube.delete("mis", "shared")
    kube.delete("namespace", NODES, wait=False)
    for kind, name in (("pod", "hub"), ("service", "hub"), ("configmap", "hub"), ("secret", "hub"), ("pvc", "cache"),
                       ("pv", "mainsail-cache")):  # fmt: skip
        kube.delete(kind, name)


def cached(name: str, cache: Object) -> Object:
    found = service(name, uri=URI)
    found["spec"]["model"] |= {"secretRef": {"name": "hub"}, "cache": cache}
    return found


def fetched(kube: Kube, name: str, namespace: str = "default") -> Object:
    return condition(kube.get("mis", name, namespace), "ModelFetched")


def wait_told(kube: Kube, name: str, words: str) -> Object:
    """The service whose ModelFetched says that."""
    return wait_for(f"{name}: {words}", lambda: words in condition(obj := kube.get("mis", name), "ModelFetched").get(
        "message", "") and obj, story=kube.story)  # fmt: skip


def wait_serving(kube: Kube, replicas: int) -> None:
    """The service in `NODES`."""

    def check() -> bool:
        status = (kube.get("mis", "local", NODES) or {}).get("status", {})
        return status.get("servingReplicas") == replicas

    wait_for(f"local with {replicas} serving", check, story=lambda: kube.story(NODES))


def test_from_a_missing_secret_and_a_wrong_token_to_an_answer(kube: Kube, gateway_url: str, folders) -> None:
    claim, node = folders
    applied = time.monotonic()
    local = cached("local", {"nodePath": str(node)})
    local["metadata"]["namespace"] = NODES
    kube.apply(cached("shared", {"claim": "cache"}), local)
    told = condition(wait_told(kube, "shared", 'secret "hub" not found'), "ModelFetched")
    assert (told["status"], told["reason"]) == ("False", "CreateContainerConfigError")
    kube.apply(hub.secret("hf_wrong"))
    refused = wait_told(kube, "shared", "HF_TOKEN")
    assert condition(refused, "ModelFetched")["reason"] == "ModelNotFound"
    assert condition(refused, "Stalled")["reason"] == "ModelNotFound"
    assert pods(kube, "shared") == [], "no GPU waits for a download"
    print(f"missing Secret and wrong token told after {time.monotonic() - applied:.0f} s")
    kube.apply(hub.secret(hub.TOKEN), hub.secret(hub.TOKEN, NODES))
    wait_ready(kube, "shared")
    assert fetched(kube, "shared")["status"] == "True"
    wait_serving(kube, 1)
    wait_for("the node's copy", lambda: fetched(kube, "local", NODES).get("status") == "True",
             story=lambda: kube.story(NODES))  # fmt: skip
    (copy,) = [path for path in claim.iterdir() if not path.name.startswith(".")]
    assert {path.name for path in copy.iterdir() if path.is_file()} >= {"config.json", "model.safetensors"}
    assert (node / copy.name / "model.safetensors").exists()
    (daemons,) = kube.list("daemonsets", NODES)
    assert daemons["status"]["numberReady"] == 1
    wait_routed(gateway_url, "shared")
    with client(gateway_url) as api:
        assert generated(api, "shared") == 3


def generated(api: openai.OpenAI, name: str) -> int:
    """Tokens of a short answer."""
    ask: Object = {"prompt": "Hi", "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    usage = api.completions.create(model=name, **ask).usage
    return usage.completion_tokens if usage else 0


def test_a_new_replica_starts_from_the_nodes_disk(kube: Kube, folders) -> None:
    """With the hub away, another replica starts: nothing is asked for that is there."""
    kube.delete("pod", "hub")
    kube.run("scale", "mis", "local", "-n", NODES, "--replicas=2")
    wait_serving(kube, 2)


def bought(name: str, uri: str, **model: object) -> Object:
    """A service whose model comes from one of the stores."""
    found = service(name, uri=uri)
    found["spec"]["model"] |= {"secretRef": {"name": "stores"}, **model}
    return found


def cramped() -> Object:
    """Without a cache, into a volume of one mebibyte."""
    found = bought("cramped", stores.OCI_URI)
    small = {"name": "model", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}
    found["spec"]["podTemplate"] = {"spec": {"volumes": [small]}}
    return found


@pytest.fixture
def both_stores(kube: Kube, folders) -> Iterator[tuple[str, str]]:
    """The right key for the bucket."""
    kube.apply(*stores.objects(), stores.secret("AKIAWRONG", "wrong", "wrong"))
    for name in ("s3", "registry"):
        kube.run("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={HANG_S}s")
    keys = kube.run("get", "--raw", f"/api/v1/namespaces/default/pods/s3:{stores.PORT + 1}/proxy/keys")
    key, secret = json.loads(keys)
    yield key, secret
    for name in ("bucket", "image", "missing", "cramped", "adapted-by-s3"):
        kube.delete("mis", name, wait=False)
    for name in ("s3", "registry"):
        for kind in ("pod", "service", "configmap"):
            kube.delete(kind, name)
    kube.delete("secret", "stores")


@pytest.mark.slow
def test_a_bucket_and_a_registry(kube: Kube, gateway_url: str, folders, both_stores) -> None:
    """Refused credentials and too little disk are told; so is a missing model, once one may look."""
    claim, _ = folders
    stale = old_copy(claim, "left-behind-0123456789", 3 << 20)
    cache = {"claim": "cache"}
    # The limit is below what lies there already: what nobody uses goes, what is in use stays.
    kube.apply(bought("bucket", stores.S3_URI, cache=cache | {"limit": "1Mi"}),
               bought("image", stores.OCI_URI, cache=cache))  # fmt: skip
    told(kube, "bucket", "CredentialsRefused", "AWS_ACCESS_KEY_ID")
    told(kube, "image", "CredentialsRefused", "")
    kube.apply(adapted())
    told(kube, "adapted-by-s3", "CredentialsRefused", "AWS_ACCESS_KEY_ID", kind="AdaptersLoaded")
    kube.apply(stores.secret(both_stores[0], both_stores[1], stores.ACCOUNT[1]))
    told(kube, "adapted-by-s3", "AdapterNotFound", "none", kind="AdaptersLoaded")
    kube.apply(bought("missing", f"s3://{stores.BUCKET}/none", cache=cache), cramped())
    told(kube, "missing", "ModelNotFound", "none")
    told(kube, "cramped", "DiskFull", "make room")
    for name in ("bucket", "image"):
        wait_ready(kube, name)
        wait_routed(gateway_url, name)
        with client(gateway_url) as api:
            assert generated(api, name) == 3
    assert not stale.exists(), "nobody uses it, and the limit is reached"
    left = {path.name.partition("-")[0] for path in claim.iterdir() if not path.name.startswith(".")}
    assert left >= {"models", "registry.default.svc.cluster.local"}


def adapted() -> Object:
    """A model that is there, and an adapter that is not."""
    found = service("adapted-by-s3", uri="pvc://models/tiny")
    adapter = {"name": "sql", "uri": f"s3://{stores.BUCKET}/none", "secretRef": {"name": "stores"}}
    found["spec"]["adapters"] = [adapter]
    return found


def told(kube: Kube, name: str, reason: str, words: str, kind: str = "ModelFetched") -> None:
    began = time.monotonic()
    found = wait_for(f"{name}: {reason}", lambda: (c := condition(kube.get("mis", name), kind)).get("reason") == reason
                     and c, story=kube.story)  # fmt: skip
    assert words in found["message"]
    assert condition(kube.get("mis", name), "Stalled")["reason"] == reason
    print(f"{name}: {reason} after {time.monotonic() - began:.0f} s: {found['message']}")


def old_copy(cache: Path, name: str, size: int) -> Path:
    """A copy as an earlier fetch left it a day ago."""
    folder, lock = cache / name, cache / f".{name}.lock"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    lock.touch()
    yesterday = time.time() - 86_400
    for path in (folder, folder / "model.safetensors", lock):
        os.chown(path, 65534, 65534)
    os.utime(lock, (yesterday, yesterday))
    return folder
