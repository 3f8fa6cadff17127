"""Which revision a request goes to, by the weights that the operator states. Pure.

**Exact**: smooth weighted round-robin (nginx): every request gives each revision credit for its weight, the richest is
chosen and pays the sum. Over any run of requests a revision's share differs from its weight by less than one request
for each revision, and the turns of a small weight are spread out instead of coming in a row.

**Sticky**: whoever names a session or a user is placed by a hash of the name, on a line that begins with the newest
revision. While the newest one's weight grows, sessions only ever move from an old revision to it,
once; while nothing changes they stay. A sticky choice is paid from the same credits, so that the others make up for it.
A conversation that has no name is known by its beginning, which many may share: its first turn is placed the same way
as long as that keeps to the weights (`SOFT_TURNS`), so that a thousand equal prompts are still split; later turns stay.

A revision of weight 0 gets nothing while another serves: that is what takes a bad revision out, and it must not be
undone by a retry.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Weights = Sequence[tuple[str, int]]
"""Revisions and their weights, the newest first, as in the service's status."""

SOFT_TURNS = 4
"""How far a revision may be ahead of its weight, in turns, for a soft choice still to count."""


class Sticky(NamedTuple):
    """What a request's place on the line comes from."""

    name: str
    firm: bool = True
    """It decides. Else only while its revision is not too far ahead."""


_MOST_CREDIT = 16
"""In turns: how much of what sticky requests took (or left) the others make up for."""


def eligible(weights: Weights, serving: Mapping[str, bool]) -> list[tuple[str, int]]:
    """The revisions that may get a request. serving: those with endpoints to try, and whether any of them is healthy.

    Empty: the weights decide nothing (there are none, or none of the weighted revisions serves)."""
    weighted = [(name, weight) for name, weight in weights if weight > 0 and name in serving]
    return [(name, weight) for name, weight in weighted if serving[name]] or weighted


def position(name: str) -> float:
    """A session's or user's place on the line, 0 ≤ p < 1; the same in every gateway."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"revision").digest()
    return int.from_bytes(digest, "big") / 2**64


def placed(weights: Weights, place: float) -> str:
    """The revision at that place, each taking a part of the line for its weight."""
    rest = place * sum(weight for _, weight in weights)
    for name, weight in weights:
        if rest < weight:
            return name
        rest -= weight
    return weights[-1][0]


class Split:
    """The credits of a service's revisions."""

    def __init__(self) -> None:
        self._credits: dict[str, float] = {}

    def choose(self, weights: Weights, sticky: Sticky | None = None) -> str:
        """The revision for a request. Weights are above 0, and not none."""
        total = sum(weight for _, weight in weights)
        bound = _MOST_CREDIT * total
        credit = {name: min(bound, max(-bound, self._credits.get(name, 0) + weight)) for name, weight in weights}
        chosen = max(credit, key=credit.__getitem__)
        if sticky is not None:
            place = placed(weights, position(sticky.name))
            chosen = place if sticky.firm or credit[place] > -SOFT_TURNS * total else chosen
        credit[chosen] -= total
        self._credits = credit
        return chosen
