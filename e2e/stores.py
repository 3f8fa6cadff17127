"""An S3 server and an OCI registry in Pods, each with one model that only the right credentials open.

The S3 server is moto, with its checks of signatures and policies on. The registry is the part of the distribution
specification that a pull needs, behind HTTP Basic. Both serve the files of a folder in the claim `models`.
"""

from __future__ import annotations

from typing import Any

from e2e.cluster.images import CONTROL_PLANE_IMAGE

PORT = 8080
BUCKET, PREFIX, REPOSITORY = "models", "tiny", "org/tiny"
ACCOUNT = ("reader", "right")

S3 = f"""
import http.server, json, pathlib, urllib.request
import boto3
from moto.server import ThreadedMotoServer

moto = ThreadedMotoServer(ip_address="0.0.0.0", port={PORT}, verbose=False)
moto.start()
url = "http://127.0.0.1:{PORT}"
options = dict(endpoint_url=url, region_name="us-east-1", aws_access_key_id="setup", aws_secret_access_key="setup")
s3, iam = boto3.client("s3", **options), boto3.client("iam", **options)
s3.create_bucket(Bucket="{BUCKET}")
for file in pathlib.Path("/models/tiny").iterdir():
    s3.put_object(Bucket="{BUCKET}", Key="{PREFIX}/" + file.name, Body=file.read_bytes())
iam.create_user(UserName="reader")
policy = {{"Version": "2012-10-17", "Statement": [{{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}]}}
iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=json.dumps(policy))
key = iam.create_access_key(UserName="reader")["AccessKey"]
plain = {{"Content-Type": "text/plain"}}
urllib.request.urlopen(urllib.request.Request(url + "/moto-api/reset-auth", data=b"0", headers=plain)).read()
told = json.dumps([key["AccessKeyId"], key["SecretAccessKey"]]).encode()

class Keys(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(told)

http.server.ThreadingHTTPServer(("", {PORT} + 1), Keys).serve_forever()
"""

OCI = f"""
import base64, hashlib, json, pathlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KIND = "application/vnd.oci.image.manifest.v1+json"
RIGHT = "Basic " + base64.b64encode(b"{ACCOUNT[0]}:{ACCOUNT[1]}").decode()
blobs, layers = {{}}, []
for file in pathlib.Path("/models/tiny").iterdir():
    body = file.read_bytes()
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    blobs[digest] = body
    layers.append({{"mediaType": "application/octet-stream", "digest": digest, "size": len(body),
                   "annotations": {{"org.opencontainers.image.title": file.name}}}})
manifest = json.dumps({{"schemaVersion": 2, "mediaType": KIND, "layers": layers}}).encode()

class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        base = "/v2/{REPOSITORY}/"
        if self.headers.get("authorization") != RIGHT:
            return self.answer(401, b"", {{"WWW-Authenticate": 'Basic realm="registry"'}})
        if self.path == base + "manifests/v1":
            return self.answer(200, manifest, {{"Content-Type": KIND}})
        body = blobs.get(self.path.removeprefix(base + "blobs/"))
        self.answer(200 if body else 404, body or b"", {{}})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {{"Content-Length": str(len(body)), **headers}}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer(("", {PORT}), Registry).serve_forever()
"""


def objects() -> list[dict[str, Any]]:
    return [*_server("s3", S3, ready_port=PORT + 1), *_server("registry", OCI, ready_port=PORT)]


def _server(name: str, script: str, *, ready_port: int) -> list[dict[str, Any]]:
    container = {
        "name": name, "image": CONTROL_PLANE_IMAGE, "command": ["/opt/mainsail/venv/bin/python", "/script/server.py"],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "readinessProbe": {"tcpSocket": {"port": ready_port}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "script", "mountPath": "/script"},
                         {"name": "models", "mountPath": "/models", "readOnly": True}],
    }  # fmt: skip
    account = {"runAsNonRoot": True, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
    volumes = [{"name": "script", "configMap": {"name": name}},
               {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}]  # fmt: skip
    meta, labels = {"name": name, "namespace": "default"}, {"app": name}
    ports = [{"name": f"port-{port}", "port": port} for port in (PORT, PORT + 1)]
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"server.py": script}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {**meta, "labels": labels},
         "spec": {"containers": [container], "volumes": volumes, "securityContext": account,
                  "terminationGracePeriodSeconds": 0}},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": ports}},
    ]  # fmt: skip


def secret(key: str, secret_key: str, password: str) -> dict[str, Any]:
    """One Secret for both."""
    data = {
        "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret_key, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://s3.default.svc.cluster.local:{PORT}",
        "OCI_USERNAME": ACCOUNT[0], "OCI_PASSWORD": password, "OCI_PLAIN_HTTP": "true",
    }  # fmt: skip
    meta = {"name": "stores", "namespace": "default"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": data}


S3_URI = f"s3://{BUCKET}/{PREFIX}"
OCI_URI = f"oci://registry.default.svc.cluster.local:{PORT}/{REPOSITORY}:v1"
