"""The gateway on the real cluster: clients, overload, virtual models, keys, weights, wake from zero, its own restart.

Engines run a tiny model of random weights: what is proven here is who gets which request, and what a client is told.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import httpx
import openai
import pytest
import yaml

from e2e import product, tiny, up
from e2e.cluster.place import Place
from e2e.kube import HANG_S, Kube, KubectlError, Object, condition, wait_for
from e2e.services import (
    client,
    gateways,
    known_to_gateways,
    pods,
    service,
    steady_traffic,
    wait_ready,
    wait_routed,
)

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network when it is imported
import litellm as _litellm

litellm: Any = _litellm
SYSTEM = "mainsail-system"
URI = "pvc://models/tiny"
ASK: Object = {"model": "front", "prompt": "Tell me", "max_tokens": 8, "temperature": 0}
CANARY: Object = {
    "strategy": "Canary",
    "steps": [{"weight": 25, "hold": "1h"}],
    "gate": {"minRequests": 100000, "onInconclusive": "Hold"},
}
API_KEY = "sk-" + "e2e" * 10
CHART = Path(__file__).parents[1] / "charts/mainsail"
GUARDED, GUARDED_BINDING = "guarded", "mainsail-gateway-guarded"
"""Namespace of a gateway with keys and TLS, and its ClusterRoleBinding."""


@pytest.fixture(scope="module")
def front(cluster: Place, kube: Kube, gateway_url: str) -> Iterator[Object]:
    """A service that serves, and one at zero."""
    tiny.write(cluster.models / "tiny")
    served, sleeper = service("front", uri=URI), service("sleeper", uri=URI)
    served["spec"] |= {"rollout": CANARY, "drain": {"timeout": "20s"}}
    sleeper["spec"].pop("replicas")
    sleeper["spec"]["scaling"] = {"min": 0, "max": 1, "toZero": {"after": "5s", "holdRequests": 20, "holdFor": "3m"}}
    kube.apply(served, sleeper)
    obj = wait_ready(kube, "front")
    wait_routed(gateway_url, "front")
    yield obj
    for name in ("front", "sleeper"):
        kube.delete("mis", name, wait=False)


def test_clients_work_unchanged(gateway_url: str, front: Object) -> None:
    api = client(gateway_url)
    assert {"front", "sleeper"} <= {model.id for model in api.models.list()}
    whole = api.completions.create(**ASK)
    assert whole.usage.completion_tokens == 8
    pieces = list(api.completions.create(**ASK, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    lite = {"model": "text-completion-openai/front", "api_base": f"{gateway_url}/v1", "api_key": "none"}
    told = litellm.text_completion(**lite, prompt="Tell me", max_tokens=8, temperature=0, num_retries=0)
    assert told.choices[0].text == whole.choices[0].text
    command = ["curl", "-sSN", "--fail-with-body", f"{gateway_url}/v1/completions", "-H",
               "Content-Type: application/json", "-d", json.dumps(ASK | {"stream": True})]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_S).stdout
    assert printed.rstrip().endswith("data: [DONE]")


def test_overload_is_refused_quickly_and_the_rest_is_served(kube: Kube, gateway_url: str, front: Object) -> None:
    before = {pod["metadata"]["uid"] for pod in pods(kube, "front")}
    kube.patch("mis", "front", {"spec": {"admission": {"maxConcurrency": 1, "maxQueuedRequests": 2}}})
    wait_for(
        "both gateways to know", lambda: all(g["admission"]["limit"] <= 1 for g in known_to_gateways(kube, "front"))
    )

    async def burst() -> list[tuple[int, float, httpx.Response]]:
        async with httpx.AsyncClient(base_url=gateway_url, timeout=HANG_S) as http:

            async def one() -> tuple[int, float, httpx.Response]:
                began = time.monotonic()
                answer = await http.post("/v1/completions", json=ASK | {"max_tokens": 800, "ignore_eos": True})
                return answer.status_code, time.monotonic() - began, answer

            return await asyncio.gather(*(one() for _ in range(40)))

    answers = asyncio.run(burst())
    kube.patch("mis", "front", {"spec": {"admission": None}})
    times = {code: sorted(took for found, took, _ in answers if found == code) for code in {a[0] for a in answers}}
    for code, took in sorted(times.items()):
        print(f"| {code} | {len(took)} | {took[len(took) // 2] * 1000:.0f} ms | {took[-1] * 1000:.0f} ms |")
    assert set(times) == {200, 429}
    assert len(times[429]) > len(times[200]) >= 3
    for code, _, answer in answers:
        if code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 800
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert {pod["metadata"]["uid"] for pod in pods(kube, "front")} == before, "admission restarts no pod"


def test_a_virtual_model(kube: Kube, gateway_url: str, front: Object) -> None:
    rules = [{"when": {"minPromptTokens": 100}, "to": [{"service": "front"}]},
             {"to": [{"service": "nobody"}], "fallback": [{"service": "front"}]}]  # fmt: skip
    route: Object = {
        "apiVersion": "mainsail.dev/v1alpha1", "kind": "ModelRoute",
        "metadata": {"name": "smart", "namespace": "default"}, "spec": {"rules": rules},
    }  # fmt: skip
    for wrong, told in (
        ([{"to": [{"service": "a", "external": {"url": "https://x/v1", "model": "y"}}]}], "either a service"),
        ([{"to": [{"service": "a", "weight": 0}]}], "all weights are 0"),
        ([{"to": [{"service": "a"}]}, {"when": {"tools": True}, "to": [{"service": "b"}]}], "must be the last one"),
        ([{"to": [{"external": {"url": "api.example.com", "model": "y"}}]}], "base URL"),
    ):
        with pytest.raises(KubectlError, match=told):
            kube.apply(route | {"spec": {"rules": wrong}})
    kube.apply(route)
    try:
        wait_routed(gateway_url, "smart")
        ask: Object = ASK | {"model": "smart"}
        raw = client(gateway_url).completions.with_raw_response.create(**ask)
        assert raw.headers["x-mainsail-answered-by"] == "default/front"
        assert raw.parse().model == "front"
        told = wait_for("a status", lambda: condition(kube.get("modelroute", "smart"), "Ready"))
        assert (told["status"], told["reason"]) == ("False", "ServiceNotFound")
        assert "nobody" in told["message"]
    finally:
        kube.delete("modelroute", "smart")


def test_both_gateways_restarted_under_load_lose_nothing(kube: Kube, gateway_url: str, front: Object) -> None:
    with steady_traffic(gateway_url, "front", streams=4) as traffic:
        kube.run("rollout", "restart", "deployment/mainsail-gateway", "-n", SYSTEM)
        kube.run("rollout", "status", "deployment/mainsail-gateway", "-n", SYSTEM)
        wait_for("the old gateways gone", lambda: len(gateways(kube)) == 2)
    assert traffic.failures == []
    assert traffic.completed > 4


def test_keys_and_tls_of_the_chart(cluster: Place, kube: Kube, front: Object, tmp_path: Path) -> None:
    """A second gateway, as the chart renders it with keys and a certificate, in a namespace of its own. Neither a new
    key nor a new certificate restarts it."""
    certificate(tmp_path, "first")
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": GUARDED}})
    try:
        kube.apply(tls_secret(tmp_path), key_secret("few", API_KEY, requestsPerMinute="3", models="fr*"))
        kube.apply(*guarded_gateway(cluster))
        kube.run("rollout", "status", "deployment/mainsail-gateway", "-n", GUARDED)
        (pod,) = kube.list("pods", GUARDED)
        with forwarded(kube, "deployment/mainsail-gateway", 8080) as port:
            url = f"https://127.0.0.1:{port}/v1"
            with trusting(tmp_path) as http:
                keys_are_asked_for(kube, openai.OpenAI(
                    base_url=url, api_key=API_KEY, max_retries=0, timeout=HANG_S, http_client=http
                ))  # fmt: skip
                certificate(tmp_path, "second")
                kube.apply(tls_secret(tmp_path))
                looks = itertools.count()

                def looked() -> bool:
                    """The kubelet looks at a pod's Secrets every minute, and whenever the pod changes."""
                    kube.run("annotate", "pod", pod["metadata"]["name"], "-n", GUARDED, f"look={next(looks)}",
                             "--overwrite")  # fmt: skip
                    http.get(f"{url}/models")  # in use, and so kept open
                    return answers(other, url)

                with trusting(tmp_path) as other:
                    wait_for("the new certificate", looked)
                assert http.get(f"{url}/models").status_code == 401, "an open connection goes on with the old one"
        (same,) = kube.list("pods", GUARDED)
        assert same["metadata"]["uid"] == pod["metadata"]["uid"]
        assert same["status"]["containerStatuses"][0]["restartCount"] == 0
    finally:
        kube.delete("clusterrolebinding", GUARDED_BINDING, wait=False)
        kube.delete("namespace", GUARDED, wait=False)


def keys_are_asked_for(kube: Kube, api: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="sk-" + "none" * 8).completions.create(**ASK)
    wait_for("the key", lambda: listed(api) == {"front"})
    for _ in range(3):
        assert api.completions.create(**ASK).usage.completion_tokens == 8
    with pytest.raises(openai.RateLimitError) as error:
        api.completions.create(**ASK)
    assert int(error.value.response.headers["retry-after"]) >= 1
    for name in ("sleeper", "nobody-has-it"):
        with pytest.raises(openai.PermissionDeniedError):
            api.completions.create(**ASK | {"model": name})
    newer = api.with_options(api_key="sk-" + "new" * 10)
    kube.apply(key_secret("few", f"{API_KEY}\n{newer.api_key}"))
    wait_for("the new key beside the old one", lambda: {"front", "sleeper"} <= listed(newer))
    assert listed(api) == listed(newer)
    kube.apply(key_secret("few", newer.api_key))
    wait_for("the old key refused", lambda: not listed(api))
    assert newer.completions.create(**ASK).usage.completion_tokens == 8, "no limits any more"


def listed(api: openai.OpenAI) -> set[str]:
    try:
        return {model.id for model in api.models.list()}
    except (openai.AuthenticationError, openai.APIConnectionError, openai.InternalServerError):
        return set()


def key_secret(name: str, key: str, **fields: str) -> Object:
    return {
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": name, "namespace": GUARDED, "labels": {"mainsail.dev/api-key": "true"}},
        "data": {field: base64.b64encode(value.encode()).decode() for field, value in {"key": key, **fields}.items()},
    }  # fmt: skip


def tls_secret(folder: Path) -> Object:
    data = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in ("tls.crt", "tls.key")}
    return {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": "front-door", "namespace": GUARDED}, "data": data}  # fmt: skip


def certificate(folder: Path, name: str) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "tls.key", "-out", folder / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip


def trusting(folder: Path) -> httpx.Client:
    """A client that trusts the certificate there, and no other."""
    kept = httpx.Limits(keepalive_expiry=120)
    return httpx.Client(verify=ssl.create_default_context(cafile=folder / "tls.crt"), timeout=HANG_S, limits=kept)


def guarded_gateway(cluster: Place) -> list[Object]:
    """The chart's gateway; the one ClusterRole is there already, and its binding gets a name of its own."""
    values = ("gateway.auth.mode=Keys", "gateway.tls.secretName=front-door", "gateway.replicas=1")
    command: list[str | Path] = [cluster.programs / "helm", "template", "mainsail", CHART, "--namespace", GUARDED,
                                 "--show-only", "templates/gateway.yaml",
                                 *product.image_values(up.rig_target(cluster))]  # fmt: skip
    command += [part for value in values for part in ("--set", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=True)
    found = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] != "ClusterRole"]
    for each in found:
        if each["kind"] == "ClusterRoleBinding":
            each["metadata"]["name"] = GUARDED_BINDING
    return found


@contextmanager
def forwarded(kube: Kube, target: str, port: int) -> Iterator[int]:
    """A port of this machine that leads to a pod of the guarded gateway."""
    command = [kube.kubectl, "--kubeconfig", str(kube.kubeconfig), "port-forward", "-n", GUARDED, target, f":{port}"]
    with NamedTemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:

        def listening() -> int:
            """The port that it has found free."""
            told = Path(said.name).read_text()
            assert process.poll() is None, told
            found = re.search(r"Forwarding from 127\.0\.0\.1:([0-9]+) ", told)
            return int(found.group(1)) if found else 0

        try:
            yield wait_for("the forwarded port", listening)
        finally:
            process.terminate()


def answers(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/models").status_code == 401
    except httpx.HTTPError:
        return False


def test_what_engines_have_cached_is_known(kube: Kube, gateway_url: str, front: Object) -> None:
    """Both gateways follow the engine's KV events: told by metrics, and by why an endpoint would be picked."""
    said = " ".join(f"the {n}th wave" for n in range(40))
    ask: Object = {"model": "front", "messages": [{"role": "user", "content": said}], "max_tokens": 2}
    assert httpx.post(f"{gateway_url}/v1/chat/completions", json=ask, timeout=HANG_S).status_code == 200

    def blocks() -> list[float]:
        found: list[float] = []
        for pod in gateways(kube):
            text = kube.run("get", "--raw", f"/api/v1/namespaces/{SYSTEM}/pods/{pod}:8081/proxy/metrics")
            lines = [line for line in text.splitlines() if line.startswith("mainsail:gateway_kv_known_blocks{")]
            found += [float(line.rsplit(" ", 1)[1]) for line in lines if 'service="front"' in line]
        return found

    # Some 500 bytes are 30 blocks of a model over bytes, of which every fourth or so is kept.
    wait_for("both gateways know its blocks", lambda: len(found := blocks()) == 2 and min(found) >= 3)


def test_held_conversations_all_complete_and_make_their_service_grow(
    kube: Kube, gateway_url: str, front: Object
) -> None:
    """More agents than one replica has KV for, through two gateways. Only what they want together is scaled by."""
    crowd = service("crowd", uri=URI, maxModelLen=4096, kvCache={"blocks": 300})
    crowd["spec"].pop("replicas")
    targets = {"queueDepth": 1000, "kvUsage": 1, "preemptionsPerMinute": 1000}
    crowd["spec"]["scaling"] = {"min": 1, "max": 2, "targets": targets}
    kube.apply(crowd)
    try:
        wait_ready(kube, "crowd")
        wait_routed(gateway_url, "crowd")

        told: list[Object] = []

        def grown() -> bool:
            told.append((kube.get("mis", "crowd") or {}).get("status", {}).get("scaling") or {})
            return told[-1].get("desired") == 2

        turns = asyncio.run(agents(gateway_url, "crowd", 16, grown))
        assert told[-1]["reason"] == "HeldSessions", told[-1]
        assert min(turns) >= 2, f"nobody is starved: {turns}"
    finally:
        kube.delete("mis", "crowd", wait=False)


async def agents(url: str, model: str, count: int, enough: Callable[[], bool]) -> list[int]:
    """So many conversations at once, each a chain of turns without any id, until it is enough and each had two turns;
    how many turns each had. Every turn has to be answered."""
    done = asyncio.Event()
    turns = [0] * count

    async def agent(http: httpx.AsyncClient, number: int) -> None:
        talk: list[dict[str, str]] = []
        while not done.is_set() or turns[number] < 2:
            said = f"{number} {turns[number]} " * (300 if not talk else 20)
            talk.append({"role": "user", "content": said})
            body = {"model": model, "messages": talk, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            talk.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"] or ""})
            turns[number] += 1
            talk = talk if len(talk) < 16 else []

    async def watch() -> None:
        try:
            await asyncio.to_thread(wait_for, "enough", enough)
        finally:
            done.set()

    async with httpx.AsyncClient(base_url=url, timeout=HANG_S, limits=httpx.Limits(max_connections=count)) as http:
        await asyncio.gather(watch(), *(agent(http, number) for number in range(count)))
    return turns


def test_twenty_held_requests_wake_a_service(kube: Kube, gateway_url: str, front: Object) -> None:
    wait_for("the sleeper at zero", lambda: not pods(kube, "sleeper"), story=kube.story)
    ask: Object = ASK | {"model": "sleeper"}

    async def held() -> list[str]:
        api = openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0, timeout=HANG_S)
        async with api:

            async def streamed() -> str:
                return "".join([c.choices[0].text async for c in await api.completions.create(**ask, stream=True)])

            async def whole() -> str:
                return (await api.completions.create(**ask)).choices[0].text

            return await asyncio.gather(*(streamed() if i % 2 else whole() for i in range(20)))

    texts = asyncio.run(held())
    assert len(texts) == 20
    assert len(set(texts)) == 1, "greedy: streamed or not, everybody got the same whole answer"


def requests_by_revision(kube: Kube, name: str) -> Counter[str]:
    """What both gateways counted, from their metrics."""
    counts: Counter[str] = Counter()
    for pod in gateways(kube):
        text = kube.run("get", "--raw", f"/api/v1/namespaces/{SYSTEM}/pods/{pod}:8081/proxy/metrics")
        for line in text.splitlines():
            if line.startswith("mainsail:gateway_requests_total{") and f'service="{name}"' in line:
                revision = line.partition('revision="')[2].partition('"')[0]
                counts[revision] += int(float(line.rsplit(" ", 1)[1]))
    return counts


def test_canary_weights(kube: Kube, gateway_url: str, front: Object) -> None:
    kube.patch("mis", "front", {"spec": {"engine": {"maxNumSeqs": 12}}})

    def weights() -> dict[str, int] | None:
        status = (kube.get("mis", "front") or {}).get("status", {})
        found = {r["name"]: r["weight"] for r in status.get("revisions", [])}
        return found if sorted(found.values()) == [25, 75] else None

    shares = wait_for("weights 25 and 75", weights, story=kube.story)
    wait_for("both gateways to know", lambda: all(g["weights"] == shares for g in known_to_gateways(kube, "front")))
    before = requests_by_revision(kube, "front")
    with httpx.Client(base_url=gateway_url, timeout=HANG_S) as http:
        for _ in range(40):
            assert http.post("/v1/completions", json=ASK).status_code == 200
        homes = set()
        for _ in range(5):
            answer = http.post("/v1/completions", json=ASK, headers={"x-session-id": "mine"})
            homes.add(answer.status_code)
    got = requests_by_revision(kube, "front") - before
    assert homes == {200}
    assert sum(got.values()) == 45
    for name, weight in shares.items():
        # Each of two gateways is exact to a request; five more went together where their session belongs.
        assert abs(got[name] - 0.4 * weight) <= 2 + 5, (got, shares)
