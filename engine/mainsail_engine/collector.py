"""The garbage collector beside a loop that must not stop.

A full collection looks at every object there is. In a core, with torch's and those of a full prefix tree, it takes
0.1 s and more, in which no step is planned, and steps take 5 to 35 ms; in an API process no stream is told anything.
What a program consists of when it has started never becomes garbage, so `settle` leaves it out from then on; and all
that came since is looked through a tenth as often: by far the most of it are nodes of the tree, which live for minutes
and form no cycles once they have left it. Collections of the young generations stay as they are.
"""

from __future__ import annotations

import gc

FULL_AFTER = 100
"""Collections of the middle generation before a full one; Python's own choice is 10."""


def settle() -> None:
    """The program has started."""
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_AFTER)
