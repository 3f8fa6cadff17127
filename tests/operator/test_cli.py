"""The command line, against a real HTTP server in the API server's place."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest

from mainsail_operator.cli import annotation, main, parser, run
from mainsail_operator.rollout import verb

OBJECT = {
    "status": {
        "rollout": {"phase": "Gating", "step": 1, "since": "2026-01-01T00:00:00Z", "reason": "WaitingForRequests",
                    "message": "step 1 of 2, at 10 % of the requests: 12 of 50 requests seen.",
                    "stable": "demo-a", "target": "demo-b"},
        "revisions": [{"name": "demo-b", "weight": 10, "serving": 1, "replicas": 1},
                      {"name": "demo-a", "weight": 90, "serving": 3, "replicas": 3}],
    }
}  # fmt: skip


@pytest.fixture
def api() -> Iterator[tuple[str, list[tuple[str, str, dict]]]]:
    heard: list[tuple[str, str, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(OBJECT if self.path.endswith("/demo") else {"message": "not found: nobody"})

        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            heard.append((self.headers["content-type"], self.path, body))
            self._answer(OBJECT)

        def _answer(self, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(200 if "status" in body else 404)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()
    server.server_close()


async def test_status_tells_where_it_stands(api) -> None:
    async with httpx2.AsyncClient(base_url=api[0]) as client:
        text = await run("status", "ns", "demo", client)
        assert "Gating, step 1" in text
        assert "12 of 50 requests" in text
        assert "demo-b (target)" in text
        assert "90%" in text
        with pytest.raises(ValueError, match="nobody"):
            await run("status", "ns", "nobody", client)


async def test_commands_are_annotations(api) -> None:
    url, heard = api
    async with httpx2.AsyncClient(base_url=url) as client:
        for what in ("pause", "resume", "promote"):
            await run(what, "ns", "demo", client)
    kinds, paths, bodies = zip(*heard, strict=True)
    assert set(kinds) == {"application/merge-patch+json"}
    assert set(paths) == {"/apis/mainsail.dev/v1alpha1/namespaces/ns/inferenceservices/demo"}
    said = [body["metadata"]["annotations"]["mainsail.dev/rollout"] for body in bodies]
    assert said[:2] == ["pause", None]
    assert verb(said[2]) == "promote"


def test_a_command_that_is_carried_out_once_is_a_new_one_each_time() -> None:
    one, two = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    assert annotation("promote", one) != annotation("promote", two)
    assert verb(annotation("rollback", one) or "") == "rollback"


@pytest.mark.parametrize(("flags", "namespace"), [([], "team"), (["--namespace", "other"], "other")])
def test_the_namespace_is_the_contexts_where_none_is_given(
    api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], namespace: str
) -> None:
    """As kubectl's own commands have it."""
    url, heard = api
    context = {"cluster": "c", "user": "u", "namespace": "team"}
    config = {
        "current-context": "here", "contexts": [{"name": "here", "context": context}],
        "clusters": [{"name": "c", "cluster": {"server": url}}], "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    main(["rollout", "pause", "demo", *flags])
    assert heard[0][1].startswith(f"/apis/mainsail.dev/v1alpha1/namespaces/{namespace}/")


def test_a_wrong_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser("kubectl mis").parse_args(["rollout", "explode", "demo"])
    assert "promote" in capsys.readouterr().err
