"""A thousand InferenceServices with ten thousand pods on a real API server: what the operator takes for them.

    python -m benchmarks.operator_scale [--services 1000] [--pods 10]      → a table, and results/operator_scale.json

etcd and kube-apiserver run as plain processes on loopback, nothing else of Kubernetes: the pods are objects alone,
which this program creates and marks Ready, as kubelets would. The operator is the real program in a process of its own.
Measured, in this order:

    cold start    from the operator's start until every status says that all replicas serve; all objects are to be made
    restart       from the start of a new process, everything being there, until it reacts to a changed pod
    reaction      from a pod's change until the InferenceService's status says so, as a watch sees it
    idle          writes and lists per minute when nothing changes, as the API server counts them
    memory        resident set of the process: now and at its highest
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from e2e.cluster.place import this_place

from mainsail_operator.crd import custom_resource_definition
from mainsail_operator.objects import REVISION_LABEL, SERVICE_LABEL, revision_of
from mainsail_operator.types import InferenceServiceSpec

JSON = dict[str, Any]
NAMESPACE = "fleet"
RESULT = Path(__file__).parent / "results/operator_scale.json"
TOKEN = "benchmark"
API = "/apis/mainsail.dev/v1alpha1"
SERVICES = f"{API}/namespaces/{NAMESPACE}/inferenceservices"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
SPEC: JSON = {"model": {"uri": "pvc://models/m.gguf"}, "resources": {"limits": {"memory": "1Gi"}}}
CONCURRENT = 16


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[str]:
    """etcd and kube-apiserver with one all-mighty token. Yields the URL."""
    kubeall = str(this_place().programs / "kubeall")
    clients, peers, port = free_port(), free_port(), free_port()
    etcd_url, peer_url = f"http://127.0.0.1:{clients}", f"http://127.0.0.1:{peers}"
    (folder / "tokens").write_text(f"{TOKEN},benchmark,benchmark,system:masters\n")
    subprocess.run(["openssl", "genrsa", "-out", str(folder / "sa.key"), "2048"], check=True, capture_output=True)
    etcd = [kubeall, "etcd", f"--data-dir={folder}/etcd", f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}", f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync", "--log-level=error", "--quota-backend-bytes=4294967296"]  # fmt: skip
    server = [kubeall, "kube-apiserver", f"--etcd-servers={etcd_url}", f"--secure-port={port}",
              "--bind-address=127.0.0.1", f"--cert-dir={folder}/certs", f"--token-auth-file={folder}/tokens",
              "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount,Priority",
              "--service-cluster-ip-range=10.96.0.0/16", "--service-account-issuer=https://benchmark",
              f"--service-account-signing-key-file={folder}/sa.key", f"--service-account-key-file={folder}/sa.key",
              "--max-requests-inflight=800", "--max-mutating-requests-inflight=400"]  # fmt: skip
    with process(etcd, folder / "etcd.log"), process(server, folder / "apiserver.log"):
        yield f"https://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=CONCURRENT + 4)
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, verify=False, headers=headers, limits=limits, timeout=60) as client:
        yield client


async def until(what: str, check: Callable[[], Any], timeout_s: float, every: float = 0.05) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        await asyncio.sleep(every)
    raise SystemExit(f"not within {timeout_s:g} s: {what}")


async def answers(client: httpx.AsyncClient, path: str) -> bool:
    try:
        return (await client.get(path)).status_code == 200
    except httpx.TransportError:
        return False


async def send(client: httpx.AsyncClient, method: str, path: str, body: JSON, kind: str = "application/json") -> JSON:
    response = await client.request(method, path, content=json.dumps(body), headers={"content-type": kind})
    if response.status_code >= 300:
        raise SystemExit(f"{method} {path}: {response.status_code} {response.text[:400]}")
    return response.json()


async def each(items: list[Any], do: Callable[[Any], Any]) -> None:
    """`do` for every item, some at a time."""
    queue = iter(items)

    async def work() -> None:
        for item in queue:
            await do(item)

    await asyncio.gather(*(work() for _ in range(CONCURRENT)))


def pod_of(service: str, number: int, revision: str) -> JSON:
    labels = {"app.kubernetes.io/name": "mainsail-engine", "app.kubernetes.io/instance": service,
              "app.kubernetes.io/managed-by": "mainsail", SERVICE_LABEL: service, REVISION_LABEL: revision}  # fmt: skip
    container = {"name": "engine", "image": "mainsail/engine:0.1.0", "args": ["serve", "--model", "/models/m.gguf"] * 4,
                 "env": [{"name": f"VARIABLE_{n}", "value": "x" * 40} for n in range(8)]}  # fmt: skip
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{service}-{number}", "labels": labels},
            "spec": {"nodeName": f"node-{number}", "containers": [container]}}  # fmt: skip


def slice_of(service: str, pods: list[JSON]) -> JSON:
    """What the endpoints controller makes of a Service: gateways route to these pods."""
    endpoints = [{"addresses": ["10.0.0.1"], "conditions": {"ready": True},
                  "targetRef": {"kind": "Pod", "name": pod["name"], "uid": pod["uid"]}} for pod in pods]  # fmt: skip
    labels = {SERVICE_LABEL: service, "kubernetes.io/service-name": service}
    return {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": f"{service}-0", "labels": labels}, "endpoints": endpoints}  # fmt: skip


def ready(value: bool) -> JSON:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    conditions = [{"type": kind, "status": "True" if value or kind != "Ready" else "False", "lastTransitionTime": now}
                  for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")]  # fmt: skip
    return {"status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions}}


async def set_ready(client: httpx.AsyncClient, pod: str, value: bool) -> None:
    await send(client, "PATCH", f"{PODS}/{pod}/status", ready(value), "application/strategic-merge-patch+json")


async def populate(client: httpx.AsyncClient, names: list[str], pods: int) -> None:
    await send(client, "POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", custom_resource_definition())
    await send(client, "POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    await until("the resource being served", lambda: answers(client, SERVICES), 60)
    revision = revision_of(InferenceServiceSpec.model_validate(SPEC))

    async def make(name: str) -> None:
        body = {"apiVersion": "mainsail.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": name},
                "spec": {**SPEC, "replicas": pods}}  # fmt: skip
        await send(client, "POST", SERVICES, body)
        made = [await send(client, "POST", PODS, pod_of(name, number, revision)) for number in range(pods)]
        for pod in made:
            await set_ready(client, pod["metadata"]["name"], True)
        await send(client, "POST", SLICES, slice_of(name, [pod["metadata"] for pod in made]))

    await each(names, make)


class Statuses:
    """servingReplicas and readiness of every service, as a watch brings them, with when they came."""

    def __init__(self) -> None:
        self.serving: dict[str, tuple[int, float]] = {}
        self.settled: set[str] = set()

    async def watch(self, client: httpx.AsyncClient) -> None:
        while True:
            listed = (await client.get(SERVICES)).json()
            for one in listed["items"]:
                self._see(one)
            params = {"watch": "1", "resourceVersion": listed["metadata"]["resourceVersion"]}
            with contextlib.suppress(httpx.TransportError):
                async with client.stream("GET", SERVICES, params=params, timeout=None) as response:
                    async for line in response.aiter_lines():
                        event = json.loads(line)
                        if event["type"] in ("ADDED", "MODIFIED"):
                            self._see(event["object"])

    def _see(self, obj: JSON) -> None:
        name, status = obj["metadata"]["name"], obj.get("status") or {}
        self.serving[name] = (status.get("servingReplicas", -1), time.monotonic())
        complete = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
        if complete >= {"Ready", "RolloutComplete"} and "Reconciling" not in complete:
            self.settled.add(name)


def kubeconfig(folder: Path, url: str) -> Path:
    path = folder / "kubeconfig"
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "b",
              "clusters": [{"name": "b", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
              "users": [{"name": "b", "user": {"token": TOKEN}}],
              "contexts": [{"name": "b", "context": {"cluster": "b", "user": "b"}}]}  # fmt: skip
    path.write_text(json.dumps(config))
    return path


@contextlib.contextmanager
def operator(folder: Path, url: str, identity: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"KUBECONFIG": str(kubeconfig(folder, url)), "MAINSAIL_NAMESPACE": NAMESPACE,
                   "MAINSAIL_IDENTITY": identity, "MAINSAIL_HEALTH_PORT": str(free_port())}  # fmt: skip
    command = [sys.executable, "-m", "mainsail_operator"]
    with process(command, folder / f"{identity}.log", **environment) as started:
        yield started


async def react(client: httpx.AsyncClient, statuses: Statuses, name: str, number: int, pods: int) -> float:
    """Seconds from a pod's change until the status says so; then the pod is Ready again."""
    began = time.monotonic()
    await set_ready(client, f"{name}-{number}", False)
    await until(f"a reaction of {name}", lambda: statuses.serving[name][0] == pods - 1, 60, 0.002)
    took = statuses.serving[name][1] - began
    await set_ready(client, f"{name}-{number}", True)
    await until(f"{name} whole again", lambda: statuses.serving[name][0] == pods, 60, 0.002)
    return took


_COUNT = re.compile(r"^apiserver_request_total\{(.*)\} (\S+)$")
_WRITES = ("POST", "PUT", "PATCH", "APPLY", "DELETE")


async def requests(client: httpx.AsyncClient) -> dict[str, float]:
    """Requests so far: writes (but leases), lease writes, lists of what the operator watches."""
    found = {"writes": 0.0, "lease_writes": 0.0, "lists": 0.0}
    kinds = (
        "inferenceservices",
        "deployments",
        "pods",
        "services",
        "serviceaccounts",
        "poddisruptionbudgets",
        "endpointslices",
        "networkpolicies",
        "nodes",
        "jobs",
        "daemonsets",
    )
    for line in (await client.get("/metrics")).text.splitlines():
        match = _COUNT.match(line)
        if match is None:
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        count = float(match[2])
        if labels["verb"] in _WRITES and labels["resource"] == "leases":
            found["lease_writes"] += count
        elif labels["verb"] in _WRITES:
            found["writes"] += count
        elif labels["verb"] == "LIST" and labels["resource"] in kinds:
            found["lists"] += count
    return found


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident now and at its highest."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", status, re.M))
    return int(values["VmRSS"]) / 1024, int(values["VmHWM"]) / 1024


async def measure(folder: Path, url: str, services: int, pods: int, samples: int) -> JSON:
    names = [f"s{number:04}" for number in range(services)]
    statuses = Statuses()
    async with client_of(url) as client:
        await until("the API server", lambda: answers(client, "/readyz"), 90)
        print(f"making {services} services and {services * pods} pods …", flush=True)
        await populate(client, names, pods)
        watching = asyncio.create_task(statuses.watch(client))
        began = time.monotonic()
        with operator(folder, url, "first") as first:
            await until("all services reconciled", lambda: len(statuses.settled) == services, 900, 0.1)
            found: JSON = {"cold_start_s": round(time.monotonic() - began, 1)}
            cpu = psutil.Process(first.pid).cpu_times()
            found["cold_start_cpu_s"] = round(cpu.user + cpu.system, 1)
            found["memory_after_cold_start_mb"], found["memory_highest_cold_start_mb"] = map(
                round, memory_mb(first.pid)
            )
            print(found, flush=True)
        with operator(folder, url, "second") as second:
            found["restart_s"] = round(await react(client, statuses, names[-1], 0, pods), 1)
            draw, times = random.Random(1), []
            for _ in range(samples):
                times.append(await react(client, statuses, draw.choice(names), draw.randrange(pods), pods))
            times.sort()
            found["reaction_ms"] = {q: round(1000 * times[min(len(times) - 1, int(p * len(times)))])
                                    for q, p in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))}  # fmt: skip
            await asyncio.sleep(20)  # whatever is still on its way
            before = await requests(client)
            cpu_before = psutil.Process(second.pid).cpu_times()
            await asyncio.sleep(60)
            after, cpu = await requests(client), psutil.Process(second.pid).cpu_times()
            found["idle_per_minute"] = {kind: round(after[kind] - before[kind]) for kind in before}
            busy = cpu.user + cpu.system - cpu_before.user - cpu_before.system
            found["idle_cpu_cores"] = round(busy / 60, 3)
            found["memory_mb"], found["memory_highest_mb"] = map(round, memory_mb(second.pid))
        watching.cancel()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator_scale", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--pods", type=int, default=10, help="of each service")
    parser.add_argument("--samples", type=int, default=200, help="reactions measured")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mainsail-scale-") as name, api_server(Path(name)) as url:
        try:
            found = asyncio.run(measure(Path(name), url, options.services, options.pods, options.samples))
        except BaseException:
            for log in sorted(Path(name).glob("*.log")):
                print(
                    f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:]), file=sys.stderr
                )
            raise
    machine = {"cores": os.cpu_count(), "load_before": round(load, 1)}
    result = {"services": options.services, "pods": options.services * options.pods, "machine": machine, **found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
