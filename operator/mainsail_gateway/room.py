"""How many requests a service's engines could take at once, by their own words. Pure.

Latency (gradient.py) speaks afterwards, and a burst looks to it like overload: fifty prompts that arrive together are
answered one after the other, and a limit that falls for that makes the next burst wait although the engines have room.
Engines say it themselves: how many requests they run at once, how many they have, how many of those wait, and what
their KV pools hold. As long as they do, a request that fits is let in, whatever the latency says:

    slots   those of all replicas, without what others (other gateways) have there
    memory  the replicas' KV, without what the running ones will need (prompt and expected answer) and what others have

An engine whose requests wait has shown how many it really runs, for reasons of its own (longer answers than expected,
say): that counts as its slots from then on, until it runs more without anybody's waiting. Beyond the room that they
say they have, and for engines that say nothing, the gradient decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mainsail_gateway.balance import FRESH_S, Load

WAITS = 0.1
"""Part of an engine's running requests that may wait there without its being called full: they came in this moment."""
GROWTH = 1.25
"""What an engine that was full is tried with, when it runs as many again and nobody waits."""
NEARLY = 0.8


@dataclass(slots=True)
class Room:
    """What the engines of one service say, for one replica."""

    slots: float = 0.0
    """Requests at once; 0: they do not say."""
    kv_tokens: float = 0.0
    others: float = 0.0
    """Requests there that are not ours."""
    shown: float | None = None
    """How many ran in the fullest when requests waited there."""
    heard: float = -FRESH_S
    """When something new was said."""

    def hear(self, loads: Iterable[Load], own: int, now: float) -> None:
        """After the engines were asked. own: how many of our requests run in all of them."""
        said = [load for load in loads if load.max_running and load.kv_tokens and now - load.observed < FRESH_S]
        if not said:
            self.slots = 0.0
            return
        if max(load.observed for load in said) <= self.heard:
            return
        self.heard = now
        self._judge(said)
        most = sum(load.max_running for load in said) / len(said)
        self.slots = most if self.shown is None else min(most, self.shown)
        self.kv_tokens = sum(load.kv_tokens for load in said) / len(said)
        self.others = max(0, sum(load.running + load.waiting for load in said) - own) / len(said)

    def _judge(self, said: list[Load]) -> None:
        full = [load.running for load in said if load.waiting > max(1.0, WAITS * load.running)]
        busiest = max(load.running for load in said)
        if full:
            self.shown = float(max(1, *full))
        elif self.shown is not None and busiest >= NEARLY * self.shown:
            self.shown = max(self.shown, float(busiest)) * GROWTH + 1

    def limit(self, replicas: int, running: int, tokens: int, mean_tokens: float) -> float:
        """As many may run at once, of which so many do, with so many tokens; 0: nothing is known.

        mean_tokens: of one request, its prompt and its answer."""
        if not self.slots:
            return 0.0
        slots = replicas * (self.slots - self.others)
        fitting = (replicas * self.kv_tokens - tokens) / max(1.0, mean_tokens) - replicas * self.others
        return max(0.0, min(slots, running + fitting))
