import httpx
import pytest

from mainsail_gateway.health import STUCK_S, Health, HealthServer, checks_of, exposition
from mainsail_gateway.metrics import Metrics


def test_states():
    health = Health(beat=100.0)
    assert health.live(100.0 + STUCK_S / 2)[0]
    assert health.live(100.0 + STUCK_S + 1) == (False, "the event loop has not moved for 31 s")
    assert not health.ready(100.0)[0]
    health.synced = True
    assert health.ready(100.0) == (True, "ok")
    health.draining = True
    assert health.ready(100.0) == (False, "draining")
    assert health.live(100.0)[0]


@pytest.fixture
def server():
    health = Health(synced=True)
    server = HealthServer(("127.0.0.1", 0), checks_of(health), exposition(Metrics().registry))
    server.start()
    yield health, f"http://127.0.0.1:{server.port}"
    server.stop()


def test_over_http(server):
    health, url = server
    assert httpx.get(url + "/health/ready").status_code == 200
    health.draining = True
    assert httpx.get(url + "/health/ready").status_code == 503
    assert httpx.get(url + "/health/live").status_code == 200
    assert httpx.get(url + "/health/startup").status_code == 200
    assert "mainsail:gateway_name_conflicts" in httpx.get(url + "/metrics").text
    only = httpx.get(url + "/metrics", params={"name[]": "mainsail:gateway_name_conflicts"}).text
    assert {line.split()[2] for line in only.splitlines() if line.startswith("#")} == {
        "mainsail:gateway_name_conflicts"
    }
    assert httpx.get(url + "/x").status_code == 404
