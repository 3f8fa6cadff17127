"""python -m e2e.cluster up|down|status"""

from __future__ import annotations

import sys

from e2e.cluster import rig
from e2e.cluster.place import this_place
from e2e.steps import Progress, report_and_exit

NOT_UP = 3


def main(argv: list[str]) -> int:
    """The exit code: 0, or 3 when `status` finds no cluster that can be used."""
    place, progress = this_place(), Progress()
    match argv:
        case ["up"]:
            made = rig.up(place)
            progress.say(f"cluster {place.name} {'is up' if made else 'was up already'}: KUBECONFIG={place.kubeconfig}")
        case ["down"]:
            progress.say(f"cluster {place.name} is down: {rig.down(place)} processes ended")
        case ["status"]:
            return _status(rig.status(place), place.name)
        case _:
            print("usage: python -m e2e.cluster up|down|status", file=sys.stderr)
            return 2
    return 0


def _status(found: rig.Status, name: str) -> int:
    if found.whole:
        print(f"{name}: up")
        return 0
    if not found.running:
        print(f"{name}: down")
        return NOT_UP
    story = [f"ended: {', '.join(found.ended)}"] if found.ended else []
    story += [found.failed] if found.failed else []
    print(f"{name}: running but not whole; {'; '.join(story) or 'the API server does not answer'}")
    return NOT_UP


if __name__ == "__main__":
    report_and_exit(lambda: main(sys.argv[1:]))
