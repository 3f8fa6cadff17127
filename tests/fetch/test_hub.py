"""hf:// against a server that speaks the Hub's paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fetch.conftest import Answer, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 300_000,
    "tokenizer.json": b"[]",
    "pytorch_model.bin": b"old" * 1000,
    "original/params.json": b"{}",
    "q/model.Q4.gguf": b"GGUF" * 50,
}
TOKEN = "hf_right"


def hub(path: str, headers: dict[str, str]) -> Answer:
    path = path.partition("?")[0]
    authorized = headers.get("authorization") == f"Bearer {TOKEN}"
    if path.startswith("/api/models/org/private") and not authorized:
        return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
    if path.startswith("/api/models/org/gated"):
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
    if path.startswith("/api/models/org/busy"):
        return 429, {}, b""
    for name in ("model", "private"):
        if path == f"/api/models/org/{name}/revision/main":
            siblings = [{"rfilename": file, "size": len(body)} for file, body in FILES.items()]
            answer = {"id": f"org/{name}", "sha": COMMIT, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        if path.startswith(f"/api/models/org/{name}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        prefix = f"/org/{name}/resolve/{COMMIT}/"
        if path.startswith(prefix):
            body = FILES[path.removeprefix(prefix)]
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"', "Accept-Ranges": "bytes"}, body
    return 404, {"X-Error-Code": "RepoNotFound"}, b""


@pytest.fixture
def endpoint():
    with serving(hub) as server:
        yield server


def test_a_repository_without_what_the_engine_does_not_read(fetch_process, fetch, endpoint, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    done = fetch_process("hf://org/model", folder, HF_ENDPOINT=endpoint.url)
    assert done.code == 0, done.log
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (tmp_path / "cache" / "model.partial").exists()
    asked = len(endpoint.asked)
    assert fetch("hf://org/model", folder, HF_ENDPOINT=endpoint.url).code == 0
    assert len(endpoint.asked) == asked, "what is complete is not asked for again"


def test_one_file(fetch, endpoint, tmp_path: Path) -> None:
    done = fetch("hf://org/model/q/model.Q4.gguf", tmp_path / "m", HF_ENDPOINT=endpoint.url)
    assert done.code == 0, done.log
    assert (tmp_path / "m" / "model.Q4.gguf").read_bytes() == FILES["q/model.Q4.gguf"]


def test_a_token_opens_a_private_repository(fetch, endpoint, tmp_path: Path) -> None:
    assert fetch("hf://org/private", tmp_path / "m", HF_ENDPOINT=endpoint.url, HF_TOKEN=TOKEN).code == 0


@pytest.mark.parametrize(
    ("uri", "flags", "reason", "words"),
    [
        ("hf://org/missing", (), "ModelNotFound", "does not exist, or is private"),
        ("hf://org/private", (), "ModelNotFound", "HF_TOKEN"),
        ("hf://org/gated", (), "CredentialsRefused", "accept its terms"),
        ("hf://org/busy", (), "RateLimited", "429"),
        ("hf://org/model", ("--revision", "v9"), "ModelNotFound", "no such revision"),
        ("hf://org/model/none.gguf", (), "ModelNotFound", "no file none.gguf"),
        ("ftp://org/model", (), "InvalidSource", "none of hf://"),
    ],
)
def test_failures_say_why(fetch, endpoint, tmp_path: Path, uri: str, flags, reason: str, words: str) -> None:
    done = fetch(uri, tmp_path / "m", *flags, HF_ENDPOINT=endpoint.url)
    assert (done.code, done.reason) == (1, reason), done.log
    assert words in done.message
    assert not (tmp_path / "m").exists()


def test_no_hub_at_all(fetch, tmp_path: Path) -> None:
    done = fetch("hf://org/model", tmp_path / "m", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.code, done.reason) == (1, "SourceUnreachable")
