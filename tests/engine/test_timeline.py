from __future__ import annotations

import subprocess
import sys
import time

from mainsail_engine.metrics import Metrics
from mainsail_engine.timeline import PHASES, Timeline, in_words, of_server


def test_time_belongs_to_the_phase_that_ends_with_it() -> None:
    moments = iter((10.5, 13.0, 13.25, 14.25))
    timeline = Timeline(10.0, lambda: next(moments))
    for phase in ("core", "imports", "device", "imports"):
        timeline.mark(phase)
    assert timeline.phases == {"core": 0.5, "imports": 3.5, "device": 0.25}


def test_the_phases_of_a_server_add_up_to_its_start() -> None:
    core = {"core": 0.5, "weights": 2.0}
    whole = of_server(core, began_s=100.0, core_started_s=101.0, now=104.0)
    assert whole == {"api": 1.0, "core": 0.5, "weights": 2.0, "http": 0.5}
    assert list(whole) == [phase for phase in PHASES if phase in whole]


def test_a_beginning_that_nobody_knows_is_the_cores() -> None:
    """process_began_s says now then: the end of the start."""
    core = {"core": 0.5, "weights": 2.0}
    assert of_server(core, began_s=104.0, core_started_s=101.0, now=104.0) == {"api": 0.0, **core, "http": 0.5}


def test_the_log_tells_phases_in_their_order() -> None:
    assert in_words({"weights": 2.04, "api": 0.5, "graphs": 1.5}) == (
        "started in 4.0 s: api 0.5, weights 2.0, graphs 1.5"
    )


def test_every_phase_has_its_series_from_the_start() -> None:
    metrics = Metrics("m", 8192)
    metrics.started({"weights": 2.5})
    values = {
        phase: metrics.registry.get_sample_value(
            "mainsail:start_time_seconds", {"model_name": "m", "engine": "0", "phase": phase}
        )
        for phase in PHASES
    }
    assert values == dict.fromkeys(PHASES, 0.0) | {"weights": 2.5}


def test_a_process_knows_when_it_began() -> None:
    script = "import time; from mainsail_engine import timeline; print(timeline.process_began_s(), time.monotonic())"
    before_s = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    began_s, later_s = map(float, ended.stdout.split())
    assert before_s - 0.1 < began_s < later_s, "the system tells it in hundredths of a second"
