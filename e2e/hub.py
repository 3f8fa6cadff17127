"""A server that speaks the Hugging Face Hub's paths, for one private model; runs in a Pod, with nothing but Python.

Its script is this file's `SCRIPT`, in a ConfigMap; the files are those of a folder in the claim `models`.
"""

from __future__ import annotations

from typing import Any

from e2e.cluster.images import CONTROL_PLANE_IMAGE

TOKEN = "hf_right"
REPOSITORY = "org/tiny"
PORT = 8080
ENDPOINT = f"http://hub.default.svc.cluster.local:{PORT}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

SCRIPT = f"""
import hashlib, json, pathlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FOLDER = pathlib.Path("/models/tiny")

class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.headers.get("authorization") != "Bearer {TOKEN}":
            return self.answer(401, b"", {{"X-Error-Code": "RepoNotFound"}})
        if path == "/api/models/{REPOSITORY}/revision/main":
            files = [{{"rfilename": f.name, "size": f.stat().st_size}} for f in FOLDER.iterdir()]
            return self.answer(200, json.dumps({{"id": "{REPOSITORY}", "sha": "{COMMIT}", "siblings": files}}).encode(),
                               {{"Content-Type": "application/json"}})
        file = FOLDER / path.rpartition("/")[2]
        if not path.startswith("/{REPOSITORY}/resolve/{COMMIT}/") or not file.is_file():
            return self.answer(404, b"", {{"X-Error-Code": "EntryNotFound"}})
        body = file.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        self.answer(200, body, {{"X-Repo-Commit": "{COMMIT}", "ETag": f'"{{etag}}"'}})

    do_HEAD = do_GET

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in ({{"Content-Length": str(len(body))}} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

ThreadingHTTPServer(("", {PORT}), Hub).serve_forever()
"""


def objects() -> list[dict[str, Any]]:
    labels = {"app": "hub"}
    container = {
        "name": "hub", "image": CONTROL_PLANE_IMAGE, "command": ["/opt/mainsail/venv/bin/python", "/script/hub.py"],
        "volumeMounts": [{"name": "script", "mountPath": "/script"},
                         {"name": "models", "mountPath": "/models", "readOnly": True}],
    }  # fmt: skip
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    account = {"runAsNonRoot": True, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
    volumes = [{"name": "script", "configMap": {"name": "hub"}},
               {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}]  # fmt: skip
    meta = {"name": "hub", "namespace": "default"}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"hub.py": SCRIPT}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {**meta, "labels": labels},
         "spec": {"containers": [container], "volumes": volumes, "securityContext": account,
                  "terminationGracePeriodSeconds": 0}},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta,
         "spec": {"selector": labels, "ports": [{"port": PORT}]}},
    ]  # fmt: skip


def secret(token: str, namespace: str = "default") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub", "namespace": namespace},
            "stringData": {"HF_TOKEN": token, "HF_ENDPOINT": ENDPOINT}}  # fmt: skip
