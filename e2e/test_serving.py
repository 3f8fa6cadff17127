"""apply → Ready → answers: one service, two services behind one endpoint, two replicas, removal."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from e2e.kube import HANG_S, Kube, condition, wait_for
from e2e.services import QUESTION, client, pods, service, wait_ready, wait_routed

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def paris(kube: Kube, gateway_url: str):
    """A running service of the real model, shared by the tests of this file."""
    kube.apply(service("paris"))
    obj = wait_ready(kube, "paris")
    wait_routed(gateway_url, "paris")
    yield obj
    kube.delete("mis", "paris")


def test_status_tells_the_story(kube: Kube, paris) -> None:
    status = paris["status"]
    assert status["url"] == "http://paris.default.svc.cluster.local/v1"
    assert condition(paris, "ModelLoaded")["status"] == "True"
    assert status["replicas"] == 1
    assert [r["weight"] for r in status["revisions"]] == [100]
    line = kube.run("get", "mis", "paris", "--no-headers").split()
    assert line[0] == "paris"
    assert "True" in line
    kube.run("wait", "--for=condition=Ready", "mis/paris", f"--timeout={HANG_S}s")


def test_answer_through_the_gateway(gateway_url: str, paris) -> None:
    answer = client(gateway_url).chat.completions.create(model="paris", messages=MESSAGES, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_equals_the_whole_answer(gateway_url: str, paris) -> None:
    api = client(gateway_url)
    ask = {"model": "paris", "messages": MESSAGES, "temperature": 0, "max_tokens": 32,
           "extra_body": {"ignore_eos": True}}  # fmt: skip
    whole = api.chat.completions.create(**ask).choices[0].message.content
    chunks = list(api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens > 1
    assert sum(1 for c in chunks if c.choices and c.choices[0].delta.content) > 3, "streamed, not in one piece"


def test_its_own_name_in_the_cluster_leads_through_the_gateway(kube: Kube, system_namespace: str, paris) -> None:
    """As a client in a pod would ask it: by status.url."""
    code = (
        "import json, sys, urllib.request as r; "
        "body = json.dumps({'model': 'paris', 'prompt': 'Hi', 'max_tokens': 1}).encode(); "
        "ask = r.Request(sys.argv[1] + '/completions', body, {'Content-Type': 'application/json'}); "
        "print(r.urlopen(ask, timeout=60).read().decode())"
    )
    answer = kube.run(
        "exec", "deploy/mainsail-gateway", "-n", system_namespace, "--", "python", "-c", code, paris["status"]["url"]
    )
    assert json.loads(answer)["choices"]


async def test_async_client(gateway_url: str, paris) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0, timeout=HANG_S) as api:
        stream = await api.completions.create(
            model="paris", prompt="The capital of France is", temperature=0, max_tokens=8, stream=True
        )
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert "Paris" in text


def test_unknown_model_is_404_in_openai_form(gateway_url: str, paris) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client(gateway_url).chat.completions.create(model="nobody", messages=MESSAGES)
    assert error.value.param == "model"
    assert "nobody" in error.value.message


def test_a_service_that_does_not_serve_is_503_with_retry_after(kube: Kube, gateway_url: str) -> None:
    kube.apply(service("asleep", replicas=0))
    try:
        reply = wait_for(
            "503 for a service without replicas",
            lambda: (r := post(gateway_url, "asleep")).status_code == 503 and r,
        )
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["message"]
    finally:
        kube.delete("mis", "asleep")


def post(url: str, model: str, **fields) -> httpx.Response:
    body = {"model": model, "prompt": "Hi", "max_tokens": 1} | fields
    return httpx.post(f"{url}/v1/completions", json=body, timeout=HANG_S)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"prompt": "word " * 3000}, 400, "prompt"),
    ],
)
def test_bad_requests_name_the_field(gateway_url: str, paris, fields, status: int, param: str) -> None:
    reply = post(gateway_url, "paris", **fields)
    assert reply.status_code in (status, 413), reply.text
    assert reply.json()["error"]["param"] == param
    assert post(gateway_url, "paris").status_code == 200


def test_two_services_behind_one_endpoint(kube: Kube, gateway_url: str, paris) -> None:
    second = service("second")
    second["spec"]["model"]["servedNames"] = ["second", "second-alias"]
    kube.apply(second)
    try:
        wait_ready(kube, "second")
        wait_routed(gateway_url, "second-alias")
        api = client(gateway_url)
        assert {"paris", "second", "second-alias"} <= {m.id for m in api.models.list()}
        for name in ("paris", "second", "second-alias"):
            answer = api.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=32)
            assert "Paris" in answer.choices[0].message.content
            assert answer.model == name
    finally:
        kube.delete("mis", "second")


def engine_requests(kube: Kube, pod: str) -> float:
    """Finished requests that the pod's own metrics count, read through the API server's proxy."""
    text = kube.run("get", "--raw", f"/api/v1/namespaces/default/pods/{pod}:8000/proxy/metrics")
    lines = [x for x in text.splitlines() if x.startswith("vllm:request_success_total")]
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines)


def test_scaled_to_two_both_pods_get_traffic(kube: Kube, gateway_url: str, paris) -> None:
    kube.run("scale", "mis/paris", "--replicas=2")
    obj = wait_ready(kube, "paris", serving=2)
    assert obj["status"]["replicas"] == 2
    names = [pod["metadata"]["name"] for pod in pods(kube, "paris")]
    assert len(names) == 2
    before = {name: engine_requests(kube, name) for name in names}

    def both_served() -> bool:
        for i in range(4):
            assert post(gateway_url, "paris", prompt=f"{i} Tell me about the number {i}").status_code == 200
        return all(engine_requests(kube, name) > before[name] for name in names)

    wait_for("traffic on both pods", both_served)
    kube.run("scale", "mis/paris", "--replicas=1")
    wait_ready(kube, "paris", serving=1)


def test_delete_leaves_nothing(kube: Kube, gateway_url: str) -> None:
    kube.apply(service("fleeting"))
    wait_ready(kube, "fleeting")
    assert kube.get("service", "fleeting")
    kube.delete("mis", "fleeting")
    kinds = "deployments,replicasets,pods,services,serviceaccounts,endpointslices,secrets,configmaps"
    wait_for(
        "all children gone",
        lambda: not kube.list(kinds, selector="mainsail.dev/service=fleeting"),
        story=kube.story,
    )
    wait_for("404 at the gateway", lambda: post(gateway_url, "fleeting").status_code == 404)
