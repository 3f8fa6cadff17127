"""`make down`: end what `make up` began; nothing stays running or mounted."""

from __future__ import annotations

from e2e import existing
from e2e.cluster import rig
from e2e.cluster.place import this_place
from e2e.steps import Progress, report_and_exit


def main() -> int:
    """The exit code."""
    place, progress = this_place(), Progress()
    with progress.step("take down"):
        existing.leave(place)
        killed = rig.down(place)
    progress.say(f"{killed} processes ended; kept: logs in {place.logs}, the cache in {place.cache}")
    return 0


if __name__ == "__main__":
    report_and_exit(main)
