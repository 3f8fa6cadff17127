"""What prompts have in which endpoint's cache, as engines tell it: block hashes, and what text they stand for. Pure.

Engines publish which KV blocks they store and remove, by hash (kv_events.py listens). A block's hash stands for its
tokens and all before them; a gateway has only text, and no tokenizer. So engines say in the head of an answer which
blocks its prompt is made of (`x-mainsail-blocks`), and the gateway remembers that for the beginnings of the prompt's
text by which it knows prompts (balance.Prefix): of the conversation all blocks, of a beginning of so many bytes those
that the prompts with that beginning have had in common. The next prompt with one of these beginnings is looked up by
it: since an engine never has a block without those before it, the deepest block that it has says how much is cached.

*Sampled.* Only hashes whose lowest bits are zero take part, one of `SAMPLE`; both sides agree on them by looking at the
hash alone. That bounds the memory of a gateway (`MAX_BLOCKS` for each endpoint) at a precision of about 64 tokens.

*Truth or nothing.* An endpoint whose events have a gap that cannot be replayed, whose engine began anew, or that has
more blocks than are kept, is unknown until it has told everything again; what is not known here the balancer guesses
from what it sent there. A guess that is wrong costs a prefill, never an answer.
"""

from __future__ import annotations

import base64
import struct
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from mainsail_gateway.balance import Prefix

SAMPLE = 4
"""One hash of so many is told and kept; a power of two."""
MAX_BLOCKS = 1 << 17
"""Sampled blocks of one endpoint: a pool of eight million tokens."""
MAX_TOLD = 1024
"""Blocks of one prompt that are believed."""
BLOCKS_HEADER = b"x-mainsail-blocks"
"""Of a request that asks for a prompt's blocks (`tell`), and of the answer that tells them."""
MAX_TEXTS = 1 << 14
"""Beginnings of prompts whose blocks are remembered."""


def is_sampled(block: int) -> bool:
    return not block & (SAMPLE - 1)


class Blocks(NamedTuple):
    """The sampled blocks of a prompt, first to last."""

    tokens: int
    """Of the whole prompt."""
    ends: array[int]
    """How many tokens there are up to the end of each block."""
    hashes: array[int]

    @classmethod
    def told(cls, value: bytes) -> Blocks | None:
        """What an engine says in the head of an answer (its server/told_blocks.py has the form); None for what is not
        that."""
        count, _, packed = value.partition(b" ")
        try:
            pairs = list(struct.iter_unpack(">IQ", base64.b64decode(packed, validate=True)))
        except (ValueError, struct.error):
            return None
        if not count.isdigit() or len(count) > 9 or len(pairs) > MAX_TOLD:
            return None
        return cls(int(count), array("I", [end for end, _ in pairs]), array("Q", [block for _, block in pairs]))

    def upto(self, tokens: float) -> Blocks:
        """Those that end within the first so many tokens."""
        count = sum(1 for end in self.ends if end <= tokens)
        return Blocks(min(self.tokens, int(tokens)), self.ends[:count], self.hashes[:count])

    def common(self, other: Blocks) -> Blocks:
        """What both begin with."""
        count = next(
            (n for n, (mine, its) in enumerate(zip(self.hashes, other.hashes, strict=False)) if mine != its),
            min(len(self.hashes), len(other.hashes)),
        )
        return Blocks(min(self.tokens, other.tokens), self.ends[:count], self.hashes[:count])


class KVIndex:
    """One service's."""

    def __init__(self) -> None:
        self._has: dict[str, set[int]] = {}
        """By endpoint; only of those that have told everything."""
        self._texts: OrderedDict[bytes, Blocks] = OrderedDict()

    # -- what endpoints have -----------------------------------------------------------------------------------------

    @property
    def known(self) -> Collection[str]:
        """The endpoints that have told what they have."""
        return self._has.keys()

    def num_blocks(self, endpoint: str) -> int:
        return len(self._has.get(endpoint, ()))

    def begin(self, endpoint: str) -> None:
        """Its cache is empty, and from now on it tells everything."""
        self._has[endpoint] = set()

    def forget(self, endpoint: str) -> None:
        """What it has is not known (any more)."""
        self._has.pop(endpoint, None)

    def stored(self, endpoint: str, blocks: Iterable[int]) -> None:
        has = self._has.get(endpoint)
        if has is not None:
            has.update(filter(is_sampled, blocks))
            if len(has) > MAX_BLOCKS:
                self.forget(endpoint)

    def removed(self, endpoint: str, blocks: Iterable[int]) -> None:
        has = self._has.get(endpoint)
        if has is not None:
            has.difference_update(blocks)

    # -- what text they stand for --------------------------------------------------------------------------------------

    def learn(self, prefixes: Sequence[Prefix], blocks: Blocks, estimate: int) -> None:
        """An engine says which blocks the prompt with these beginnings is made of, which was taken to have `estimate`
        tokens. A beginning that is as long as that stands for all of it."""
        if not blocks.hashes:
            return
        for prefix in prefixes:
            part = blocks
            if prefix.tokens < estimate:
                part = blocks.upto(blocks.tokens * prefix.tokens / estimate)
                before = self._texts.get(prefix.key)
                common = part if before is None else before.common(part)
                part = common if common.hashes else part
            self._remember(prefix.key, part)

    def _remember(self, key: bytes, blocks: Blocks) -> None:
        self._texts[key] = blocks
        self._texts.move_to_end(key)
        while len(self._texts) > MAX_TEXTS:
            self._texts.popitem(last=False)

    def cached(self, prefixes: Sequence[Prefix]) -> dict[str, int]:
        """By endpoint that is known: how many of the prompt's tokens it has. Empty: the text is not known."""
        for prefix in reversed(prefixes):
            blocks = self._texts.get(prefix.key)
            if blocks is not None and blocks.hashes:
                return {endpoint: _depth(blocks, has) for endpoint, has in self._has.items()}
        return {}


def _depth(blocks: Blocks, has: set[int]) -> int:
    """Tokens up to the deepest block that is there: before it all are, after it none."""
    low, high = 0, len(blocks.hashes)
    while low < high:
        middle = (low + high) // 2
        if blocks.hashes[middle] in has:
            low = middle + 1
        else:
            high = middle
    return blocks.ends[low - 1] if low else 0
