from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.server.health import HealthServer, Verdict, Vitals, judge

FINE = Vitals(core_alive=True, started=True, draining=False, num_requests=1, progress_at_s=100.0)


@pytest.mark.parametrize(
    ("vitals", "live", "ready", "startup"),
    [
        (FINE, True, True, True),
        (replace(FINE, progress_at_s=80.0), False, True, True),
        (replace(FINE, progress_at_s=0.0, num_requests=0), True, True, True),
        (replace(FINE, draining=True), True, False, True),
        (replace(FINE, core_alive=False), False, False, True),
        (replace(FINE, started=False, core_alive=False), True, False, False),
    ],
    ids=["fine", "hung", "idle", "draining", "core dead", "loading"],
)
def test_verdicts(vitals: Vitals, live: bool, ready: bool, startup: bool) -> None:
    def ok(path: str) -> bool:
        verdict = judge(path, vitals, limit_s=10.0, now=101.0)
        assert verdict is not None
        return verdict.ok

    assert (ok("/health/live"), ok("/health/ready"), ok("/health/startup")) == (live, ready, startup)
    assert ok("/health") == ready
    assert judge("/health/other", vitals, limit_s=10.0, now=101.0) is None


def test_the_listener_of_its_own() -> None:
    verdicts = {"/health/live": Verdict(True, "alive"), "/health/ready": Verdict(False, "draining")}
    server = HealthServer("127.0.0.1", 0, verdicts.get)
    server.start()
    try:
        base = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{base}/health/live", timeout=240) as answer:
            assert answer.status == 200
        for path, status in (("/health/ready", 503), ("/nothing", 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(base + path, timeout=240)
            assert caught.value.code == status
            caught.value.close()
        with pytest.raises(InvalidConfigurationError, match="--health-port"):
            HealthServer("127.0.0.1", server.port, verdicts.get)
    finally:
        server.close()
