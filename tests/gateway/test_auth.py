"""API keys: what a Secret may say, who is let in, and what the limits allow; over sockets, and as functions."""

import asyncio
import base64
import hashlib
import ssl
import subprocess

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway.auth import Account, ApiKey, BadSecret, KeyRing, Minute, Secret, api_key, ring
from mainsail_gateway.errors import GatewayError
from mainsail_gateway.shed import Policy
from mainsail_gateway.usage import Usage

KEY, OTHER = "sk-" + "a" * 24, "sk-" + "b" * 24
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def secret(name: str = "team", **fields: str) -> Secret:
    data = {field: base64.b64encode(value.encode()).decode() for field, value in fields.items()}
    return msgspec.convert({"metadata": {"name": name, "namespace": "ns"}, "data": data}, Secret)


def test_a_secret_with_everything():
    key = api_key(
        secret(
            sha256=hashlib.sha256(KEY.encode()).hexdigest() + "\n",
            key=OTHER,
            models="a*, b\nc",
            requestsPerMinute="10",
            tokensPerMinute=" 1000 ",
            maxConcurrency="2",
            priority="batch",
        )
    )
    assert (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency, key.priority) == (10, 1000, 2, "batch")
    assert [key.may_use(model) for model in ("abc", "b", "c", "d")] == [True, True, True, False]
    found = KeyRing.of([key])
    assert found.find(KEY.encode()) is found.find(OTHER.encode()) is key
    assert found.find(b"sk-other") is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "sha256"),
        ({"key": "tiny"}, "key"),
        ({"sha256": "12"}, "sha256"),
        ({"key": KEY, "requestsPerMinute": "many"}, "requestsPerMinute"),
        ({"key": KEY, "requests_per_minute": "1"}, "requests_per_minute"),
    ],
)
def test_a_bad_secret_is_refused_and_its_content_not_told(fields, named):
    with pytest.raises(BadSecret, match=f"`{named}`") as error:
        api_key(secret(**fields))
    assert not any(value in str(error.value) for value in fields.values())
    keys, wrong = ring({("ns", "a"): secret("a", **fields), ("ns", "b"): secret("b", key=OTHER)})
    assert list(wrong) == ["a"]
    found = keys.find(OTHER.encode())
    assert found is not None
    assert found.name == "b"


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=60), st.integers(5, 20))
def test_never_more_than_the_limit_in_any_minute(arrivals, limit):
    key, account, now = ApiKey("k", requests_per_minute=limit, tokens_per_minute=3 * limit), Account(), 0.0
    passed: list[tuple[float, int]] = []
    refusals: list[tuple[int, float]] = []
    for step, tokens in arrivals:
        now += step
        try:
            account.take(key, tokens, now)
        except GatewayError as error:
            refusals.append((error.status, error.retry_after_s or 0.0))
            continue
        account.settle(tokens, None, now)
        passed.append((now, tokens))
    assert all(status == 429 and 0 < after <= 61 for status, after in refusals)
    for start, _ in passed:
        within = [tokens for at, tokens in passed if start <= at < start + 60]
        assert len(within) <= limit
        assert sum(within) <= 3 * limit


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 9)), max_size=40), st.integers(0, 20), st.integers(10, 40))
def test_the_wait_is_what_it_takes(steps, room, limit):
    meter, now = Minute(), 0.0
    for step, amount in steps:
        now += step
        meter.add(amount, now)
    wait = meter.wait_for(min(room, limit), limit, now)
    assert meter.wait_for(min(room, limit), limit, now + wait + 0.01) == 0
    assert (wait == 0) == (meter.total(now) <= limit) or wait >= 0


def test_what_was_not_used_is_given_back():
    key, account = ApiKey("k", tokens_per_minute=100), Account()
    account.take(key, 100, 0.0)
    account.settle(100, 10, 1.0)
    account.take(key, 90, 2.0)
    with pytest.raises(GatewayError):
        account.take(key, 1, 3.0)


def test_nothing_is_given_back_of_what_the_minute_has_forgotten():
    key, account = ApiKey("k", tokens_per_minute=100), Account()
    account.take(key, 100, 0.0)
    account.settle(100, 10, 65.0, since=0.0)
    account.take(key, 100, 66.0)
    with pytest.raises(GatewayError):
        account.take(key, 1, 67.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(-9, 9)), max_size=40))
def test_a_minute_is_never_in_debt(steps):
    """Whatever is given back when: a debt would be more than the limit for who comes after."""
    meter, now = Minute(), 0.0
    for step, amount in steps:
        now += step
        meter.add(amount, now)
        assert meter.total(now) >= 0
    for later in range(62):
        assert meter.total(now + later) >= 0
    assert meter.total(now + 62) == 0


@pytest.mark.parametrize(
    "key",
    [ApiKey("k", requests_per_minute=0), ApiKey("k", tokens_per_minute=0), ApiKey("k", max_concurrency=0)],
    ids=["requests", "tokens", "at once"],
)
def test_a_limit_of_nothing_lets_nothing_through(key):
    with pytest.raises(GatewayError, match="limit of 0"):
        Account().take(key, 10, 100.0)


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_usage_is_read_from_the_tail(pieces):
    events = [b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'] * 9
    said = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5,'
    said += b' "prompt_tokens_details": {"cached_tokens": 3}}}\n\n'
    stream = b"".join(events) + said + b"data: [DONE]\n\n"
    size = len(stream) // pieces + 1
    usage = Usage(100)
    for i in range(0, len(stream), max(size, 150)):
        usage.feed(stream[i : i + max(size, 150)])
    assert (usage.prompt, usage.completion) == (7, 5)


def test_usage_of_a_response_is_read_too():
    usage = Usage(100)
    said = b'"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":0},"output_tokens":5,"total_tokens":12}'
    metadata = b'"user":null,"metadata":{"k":"%b"}' % (b"v" * 8000)
    usage.feed(b'event: response.completed\ndata: {"response":{%b,%b}}\n\n' % (said, metadata))
    assert (usage.prompt, usage.completion) == (7, 5)


def test_usage_is_estimated_where_nothing_is_said():
    usage = Usage(100)
    for _ in range(9):
        usage.feed(b'data: {"choices": []}\n\n')
    assert (usage.prompt, usage.completion) == (100, 9)


def _keys(gw, *secrets: Secret) -> None:
    gw.gateway.keys.use(*ring({("ns", s.metadata.name): s for s in secrets}))


async def test_who_has_no_key_is_told_so_and_reaches_nothing(kit):
    up = await kit.upstream()
    async with (
        kit.gateway(kit.service(up.endpoint()), auth="keys") as gw,
        httpx.AsyncClient(base_url=gw.url) as client,
    ):
        assert (await client.post(CHAT, json=BODY)).status_code == 503, "the keys are not known yet"
        _keys(gw, secret(key=KEY))
        for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": KEY}, {"authorization": "Bearer x"}):
            answer = await client.post(CHAT, json=BODY, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        assert not up.seen
        for headers in ({"authorization": f"Bearer {KEY}"}, {"api-key": KEY}, {"x-api-key": KEY}):
            assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == 200
    assert all(KEY.encode() not in seen.head for seen in up.seen), "the key ends at the gateway"


async def test_models_of_a_key_and_its_rotation(kit):
    up = await kit.upstream()
    services = (kit.service(up.endpoint()), kit.service(up.endpoint(), name="secret"))
    async with (
        kit.gateway(*services, auth="keys") as gw,
        openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key=KEY, max_retries=0) as client,
    ):
        _keys(gw, secret(key=KEY, models="m"))
        assert [m.id for m in (await client.models.list()).data] == ["m"]
        for name in ("secret", "nobody has it"):
            with pytest.raises(openai.PermissionDeniedError):
                await client.chat.completions.create(**{**BODY, "model": name})
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(name)
        _keys(gw, secret(key=KEY, models="m n*"))
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**BODY, "model": "nobody has it"})
        _keys(gw, secret(key=f"{OTHER}\n{KEY}"))
        await client.chat.completions.create(**{**BODY, "model": "secret"})
        _keys(gw, secret(key=OTHER))
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(**BODY)


async def test_limits_of_a_key(kit):
    up = await kit.upstream(kit.hold)
    async with kit.gateway(kit.service(up.endpoint()), auth="keys") as gw, httpx.AsyncClient(timeout=30) as client:
        _keys(gw, secret("few", key=KEY, requestsPerMinute="2"), secret("one", key=OTHER, maxConcurrency="1"))
        few, one = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER))
        url = gw.url + CHAT
        running = asyncio.create_task(client.post(url, json=BODY, headers=one))
        await kit.until(lambda: len(up.seen) == 1)
        refused = await client.post(url, json=BODY, headers=one)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        up.release.set()
        assert (await running).status_code == 200
        up.behave = kit.answer
        codes = [(await client.post(url, json=BODY, headers=few)).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        assert (await client.post(url, json=BODY, headers=one)).status_code == 200, "another key is not concerned"
        assert gw.metric("mainsail:gateway_key_requests_total", key="few", code="200") == 2
        assert gw.metric("mainsail:gateway_key_requests_total", key="few", code="429") == 1
        assert gw.metric("mainsail:gateway_key_tokens_total", key="few", kind="prompt") > 0
        assert gw.metric("mainsail:gateway_key_requests_in_flight", key="one") == 0


async def test_a_stream_is_charged_for_what_its_client_has_though_it_leaves_before_the_end(kit):
    up = await kit.upstream(kit.hold)
    body = {**BODY, "stream": True, "max_tokens": 10}
    async with kit.gateway(kit.service(up.endpoint()), auth="keys") as gw, httpx.AsyncClient(timeout=None) as client:
        _keys(gw, secret("few", key=KEY))
        headers = {"authorization": f"Bearer {KEY}"}
        async with client.stream("POST", gw.url + CHAT, json=body, headers=headers) as answer:
            assert await anext(answer.aiter_lines()) == "data: first"
        await kit.until(lambda: gw.metric("mainsail:gateway_key_requests_total", key="few", code="499") == 1)
        assert gw.metric("mainsail:gateway_key_tokens_total", key="few", kind="completion") == 1
        assert gw.gateway.keys.standing()["few"][2] > 1


async def test_a_keys_priority_is_its_highest(kit):
    up = await kit.upstream(kit.hold)
    policy = Policy(max_running=1, max_queued_requests=10)
    async with kit.gateway(kit.service(up.endpoint(), policy=policy), auth="keys") as gw:
        _keys(gw, secret("low", key=KEY, priority="batch"), secret("usual", key=OTHER))
        low, usual = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER))
        queue = gw.gateway.admission.doors["default", "m"].shedder
        async with httpx.AsyncClient(timeout=30) as client:
            tasks = [asyncio.create_task(client.post(gw.url + CHAT, json=BODY, headers=usual))]
            await kit.until(lambda: len(up.seen) == 1)
            for headers in ({**low, "x-mainsail-priority": "high"}, {**usual, "x-mainsail-priority": "high"}):
                tasks.append(asyncio.create_task(client.post(gw.url + CHAT, json=BODY, headers=headers)))
            await kit.until(lambda: queue.waiting == 2)
            assert sorted(t.priority for t in queue._queue()) == [-100, 0]
            up.release.set()
            up.behave = kit.answer
            await asyncio.gather(*tasks)


def _certificate(folder, name: str) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "tls.key", "-out", folder / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip


async def test_tls_is_read_again_when_it_changes(kit, tmp_path):
    up = await kit.upstream()
    _certificate(tmp_path, "first")
    files = {"tls_cert": str(tmp_path / "tls.crt"), "tls_key": str(tmp_path / "tls.key")}
    async with kit.gateway(kit.service(up.endpoint()), **files) as gw:

        async def ask() -> None:
            trust = ssl.create_default_context(cafile=files["tls_cert"])
            async with httpx.AsyncClient(verify=trust) as client:
                answer = await client.post(f"https://127.0.0.1:{gw.port}{CHAT}", json={**BODY, "stream": True})
                assert answer.text.endswith("data: [DONE]\n\n")

        await ask()
        _certificate(tmp_path, "second")
        async with asyncio.timeout(120):
            while True:
                try:
                    await ask()
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.1)
