"""An API server with real sockets: it lists and watches as a script tells it, and makes trouble."""

import asyncio
import json

import httpx

SERVICES = "/apis/mainsail.dev/v1alpha1/inferenceservices"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
ROUTES = "/apis/mainsail.dev/v1alpha1/modelroutes"
SECRETS = "/api/v1/namespaces/default/secrets"


class ApiServer:
    """List and watch over real HTTP, as kube-apiserver speaks them; `say` sends an event, the rest is trouble."""

    def __init__(self, paths=(SERVICES, SLICES)):
        self.objects = {path: {} for path in paths}
        self.version = 10
        self.lists = dict.fromkeys(self.objects, 0)
        self.watches = []  # (path, query, writer) of those open
        self.asked = []  # queries of all watches
        self.expired = False
        self.port = 0

    async def start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def away(self):
        self._server.close()
        self.drop()
        await asyncio.sleep(0)

    def drop(self):
        for _, _, writer in self.watches:
            writer.transport.abort()
        self.watches.clear()

    def put(self, path, item, *, silently=False):
        kind = "MODIFIED" if item["metadata"]["name"] in self.objects[path] else "ADDED"
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.objects[path][item["metadata"]["name"]] = item
        if not silently:
            self.say(path, kind, item)

    def delete(self, path, name, *, silently=False):
        self.version += 1
        item = self.objects[path].pop(name)
        item["metadata"]["resourceVersion"] = str(self.version)
        if not silently:
            self.say(path, "DELETED", item)

    def say(self, path, kind, item):
        line = json.dumps({"type": kind, "object": item}, ensure_ascii=False).encode() + b"\n"
        for where, _, writer in self.watches:
            if where == path:
                writer.write(b"%x\r\n%b\r\n" % (len(line), line))

    async def _serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                url = httpx.URL(head.split(" ")[1])
                if url.params.get("watch"):
                    await self._watch(url, reader, writer)
                    return
                await self._list(url, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _list(self, url, writer):
        """Two objects a page, so that continuation is used."""
        items = list(self.objects[url.path].values())
        start = int(url.params.get("continue", "0"))
        more = str(start + 2) if start + 2 < len(items) else ""
        if not more:
            self.lists[url.path] += 1
        page = {"metadata": {"resourceVersion": str(self.version), "continue": more}, "items": items[start : start + 2]}
        body = json.dumps(page).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)

    async def _watch(self, url, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        self.asked.append(dict(url.params))
        entry = (url.path, url.params, writer)
        self.watches.append(entry)
        if self.expired:
            self.expired = False
            self.say(url.path, "ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
        try:
            await reader.read(1)
        finally:
            if entry in self.watches:
                self.watches.remove(entry)


def isvc(name, **spec):
    meta = {"name": name, "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": meta, "spec": {"model": {"uri": "hf://x/y"}, **spec}}


def slices(owner, *addresses, port=8000):
    labels = {"mainsail.dev/service": owner}
    return {
        "metadata": {"name": owner + "-1", "namespace": "default", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [a], "conditions": {"ready": True}} for a in addresses],
        "ports": [{"name": "http", "port": port}],
    }


def kubeconfig(path, port):
    path.write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
            }
        )
    )
    return str(path)
