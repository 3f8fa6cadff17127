"""The writer against an HTTP server in the API server's place: what is sent, what is refused, what is fenced."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from mainsail_operator import objects
from mainsail_operator.apply import NotLeaderError, RefusedError, StaleError, WriteError, Writer
from mainsail_operator.events import Event
from mainsail_operator.objects import Owner
from mainsail_operator.plan import Apply, Delete, Forget, Mark, Scale
from mainsail_operator.types import InferenceServiceStatus

OWNER = Owner("demo", "ns", "uid-1")


@dataclass
class Api:
    """Answers by method; remembers what it was asked."""

    answers: dict[str, tuple[int, dict]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict]] = field(default_factory=list)
    url: str = ""

    def sent(self, method: str) -> dict:
        (body,) = (body for found, _, body in self.asked if found == method)
        return body


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            found.asked.append((self.command, self.path, json.loads(self.rfile.read(length) or b"{}")))
            status, body = found.answers.get(self.command, (200, {"metadata": {"name": "x"}}))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PATCH = do_POST = do_DELETE = do_PUT = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
async def writer(api: Api):
    async with httpx2.AsyncClient(base_url=api.url, trust_env=False) as client:
        yield Writer(client, lambda: True, "me")


APPLY = Apply(objects.endpoints(OWNER), "missing")
FORGET = Forget("pod", "uid-p", "node-7", "its node is gone")


async def test_a_new_object_is_applied_and_what_is_ours_is_applied_again(api: Api, writer: Writer) -> None:
    api.answers["GET"] = (404, {"message": "not found"})
    await writer.execute(OWNER, APPLY)
    api.answers["GET"] = (200, {"metadata": {"ownerReferences": [{"uid": "uid-1"}]}})
    await writer.execute(OWNER, APPLY)
    paths = [path for method, path, _ in api.asked if method == "PATCH"]
    assert len(paths) == 2
    assert all("fieldManager=mainsail-operator" in path and "demo-engines" in path for path in paths)


async def test_what_belongs_to_somebody_else_is_left_alone(api: Api, writer: Writer) -> None:
    api.answers["GET"] = (200, {"metadata": {"name": "demo-engines"}})
    with pytest.raises(RefusedError, match="does not belong to this InferenceService"):
        await writer.execute(OWNER, APPLY)
    assert [method for method, *_ in api.asked] == ["GET"]


async def test_what_an_ended_namesake_left_is_waited_for(api: Api, writer: Writer) -> None:
    old = {"kind": "InferenceService", "name": "demo", "uid": "uid-0"}
    api.answers["GET"] = (200, {"metadata": {"ownerReferences": [old]}})
    with pytest.raises(StaleError):
        await writer.execute(OWNER, APPLY)
    api.answers["GET"] = (200, {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
    with pytest.raises(StaleError):
        await writer.execute(OWNER, APPLY)


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (409, "the object has been modified", StaleError),
        (404, "not found", StaleError),
        (403, 'pods "x" is forbidden: exceeded quota', RefusedError),
        (422, "spec.x: Invalid value", RefusedError),
        (500, "failed to create typed patch object (…): .spec.nodeSelectr: field not declared in schema", RefusedError),
        (429, "too many requests", WriteError),
        (503, "etcdserver: leader changed", WriteError),
    ],
)
async def test_answers_are_told_apart(api: Api, writer: Writer, status: int, message: str, error: type) -> None:
    api.answers["PATCH"] = (status, {"message": message})
    with pytest.raises((StaleError, WriteError)) as raised:
        await writer.execute(OWNER, Scale("demo-1", 3, "why", "7"))
    assert type(raised.value) is error
    assert message[:20] in str(raised.value)


async def test_every_write_names_the_version_that_it_was_decided_on(api: Api, writer: Writer) -> None:
    await writer.execute(OWNER, Scale("demo-1", 3, "why", "7"))
    await writer.execute(OWNER, Delete("demo-0", "why", "8"))
    assert api.sent("PATCH") == {"spec": {"replicas": 3}, "metadata": {"resourceVersion": "7"}}
    assert api.sent("DELETE")["preconditions"] == {"resourceVersion": "8"}
    api.asked.clear()
    await writer.status(OWNER, InferenceServiceStatus(), "9")
    assert api.sent("PATCH")["metadata"] == {"resourceVersion": "9"}


async def test_a_mark_on_a_pod_that_is_gone_is_no_failure(api: Api, writer: Writer) -> None:
    api.answers["PATCH"] = (404, {"message": "not found"})
    await writer.execute(OWNER, Mark("pod", 100, "busy"))


async def test_a_pod_is_forgotten_only_when_its_node_is_gone(api: Api, writer: Writer) -> None:
    with pytest.raises(StaleError, match="is there"):
        await writer.execute(OWNER, FORGET)
    api.answers["GET"] = (503, {"message": "etcd is away"})
    with pytest.raises(WriteError):
        await writer.execute(OWNER, FORGET)
    assert {method for method, *_ in api.asked} == {"GET"}
    api.answers["GET"] = (404, {"message": "not found"})
    await writer.execute(OWNER, FORGET)
    assert api.sent("DELETE") == {"gracePeriodSeconds": 0, "preconditions": {"uid": "uid-p"}}


async def test_an_event_that_cannot_be_told_is_no_failure(api: Api, writer: Writer) -> None:
    api.answers["POST"] = (500, {"message": "no"})
    await writer.tell(OWNER, Event("Normal", "RolloutStarted", "x"), 1_800_000_000.0)
    assert api.sent("POST")["regarding"]["uid"] == "uid-1"


async def test_nothing_is_written_without_the_lease(api: Api) -> None:
    async with httpx2.AsyncClient(base_url=api.url, trust_env=False) as client:
        follower = Writer(client, lambda: False)
        for action in (APPLY, Scale("demo-1", 3, "why"), Mark("pod", 1, "why"), Delete("demo-0", "why"), FORGET):
            with pytest.raises(NotLeaderError):
                await follower.execute(OWNER, action)
        with pytest.raises(NotLeaderError):
            await follower.status(OWNER, InferenceServiceStatus(), "1")
    assert {method for method, *_ in api.asked} <= {"GET"}
