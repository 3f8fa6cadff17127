"""Revisions that serve badly, for the gates to catch: a sidecar in front of the engine that delays or fails requests.

It takes the engine's place behind the port that is called `http`, in the pod itself, so everything else is the product
as it is: the Service, the probes, the metrics, the gateway's view of the pod.
"""

from __future__ import annotations

from e2e.cluster.images import ENGINE_IMAGE
from e2e.kube import Object

PORT = 9000

PROXY = """
import asyncio, random, re, sys
delay, rate = float(sys.argv[1]), float(sys.argv[2])
ERROR = (b"HTTP/1.1 500 Internal Server Error\\r\\ncontent-type: application/json\\r\\ncontent-length: 34\\r\\n\\r\\n"
         b'{"error": {"message": "injected"}}')

async def pump(source, sink):
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    sink.close()

async def request(reader):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    length = re.search(rb"(?i)content-length: *([0-9]+)", head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")

async def serve(reader, writer):
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", 8000)
    answers = asyncio.create_task(pump(up_reader, writer))
    try:
        while True:
            data = await request(reader)
            if data.startswith(b"POST"):
                if random.random() < rate:
                    writer.write(ERROR)
                    continue
                await asyncio.sleep(delay)
            up_writer.write(data)
            await up_writer.drain()
    except asyncio.IncompleteReadError:
        pass
    finally:
        up_writer.close()
        await asyncio.gather(answers, return_exceptions=True)

async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 9000)
    await server.serve_forever()

asyncio.run(main())
"""


def with_fault(obj: Object, *, delay_s: float = 0.0, error_rate: float = 0.0) -> Object:
    """The service with a sidecar that answers in the engine's place."""
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    sidecar = {
        "name": "fault",
        "image": ENGINE_IMAGE,
        "command": ["python", "-c", PROXY, str(delay_s), str(error_rate)],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
        "securityContext": restricted,
    }
    engine = {"name": "engine", "ports": [{"containerPort": 8000, "name": "direct"}]}
    return obj | {"spec": obj["spec"] | {"podTemplate": {"spec": {"containers": [engine, sidecar]}}}}
