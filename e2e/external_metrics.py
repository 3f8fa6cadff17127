"""A metrics API for the cluster's own HorizontalPodAutoscaler: external.metrics.k8s.io, one metric, set by the test.

An aggregated API server of a few lines, in a Pod, as KEDA's or Prometheus' adapter is one.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from e2e.cluster.images import CONTROL_PLANE_IMAGE
from e2e.kube import Kube

NAME = "external-metrics"
METRIC = "mainsail-pressure"
PORT = 8443
GROUP_VERSION = "external.metrics.k8s.io/v1beta1"

SCRIPT = f"""
import json, ssl, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BASE = "/apis/{GROUP_VERSION}"
value = ["0"]

class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/set/"):
            value[0] = path.removeprefix("/set/")
            return self.answer({{"value": value[0]}})
        if path == BASE:
            resource = {{"name": "{METRIC}", "singularName": "", "namespaced": True, "kind": "ExternalMetricValueList",
                        "verbs": ["get"]}}
            return self.answer({{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "{GROUP_VERSION}",
                                "resources": [resource]}})
        if path.endswith("/{METRIC}"):
            item = {{"metricName": "{METRIC}", "metricLabels": {{}}, "value": value[0],
                    "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}}
            return self.answer({{"kind": "ExternalMetricValueList", "apiVersion": "{GROUP_VERSION}", "metadata": {{}},
                                "items": [item]}})
        self.answer({{"kind": "Status", "status": "Failure", "code": 404}}, 404)

    def answer(self, found, status=200):
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = ThreadingHTTPServer(("", {PORT}), Api)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def objects() -> list[dict[str, Any]]:
    meta, labels = {"name": NAME, "namespace": "default"}, {"app": NAME}
    container = {
        "name": "api", "image": CONTROL_PLANE_IMAGE, "command": ["/opt/mainsail/venv/bin/python", "/script/api.py"],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "script", "mountPath": "/script"}, {"name": "tls", "mountPath": "/tls"}],
    }  # fmt: skip
    account = {"runAsNonRoot": True, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
    volumes = [{"name": "script", "configMap": {"name": NAME}}, {"name": "tls", "secret": {"secretName": NAME}}]
    group, _, version = GROUP_VERSION.partition("/")
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"api.py": SCRIPT}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "type": "kubernetes.io/tls", "stringData": _keys()},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {**meta, "labels": labels},
         "spec": {"containers": [container], "volumes": volumes, "securityContext": account,
                  "terminationGracePeriodSeconds": 0}},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta,
         "spec": {"selector": labels, "ports": [{"port": 443, "targetPort": PORT}]}},
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": f"{version}.{group}"},
         "spec": {"group": group, "version": version, "groupPriorityMinimum": 100, "versionPriority": 100,
                  "insecureSkipTLSVerify": True, "service": {"name": NAME, "namespace": "default", "port": 443}}},
    ]  # fmt: skip


def _keys() -> dict[str, str]:
    """A certificate that nobody checks."""
    with tempfile.TemporaryDirectory() as name:
        key, certificate = Path(name, "key"), Path(name, "crt")
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
        subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
        return {"tls.key": key.read_text(), "tls.crt": certificate.read_text()}


def remove(kube: Kube) -> None:
    group, _, version = GROUP_VERSION.partition("/")
    kube.delete("apiservice", f"{version}.{group}")
    for kind in ("service", "pod", "secret", "configmap"):
        kube.delete(kind, NAME)


def set_value(kube: Kube, value: float) -> None:
    """The metric's value from now on."""
    kube.run("get", "--raw", f"/api/v1/namespaces/default/services/https:{NAME}:443/proxy/set/{value:g}")
