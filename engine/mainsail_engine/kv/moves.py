"""What becomes of blocks' contents: the cache decides it, a step's plan carries it, the runner does it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class BlockCopy:
    """Copy-on-write of a partly shared tail: the first num_tokens positions of block src, to block dst."""

    src: int
    dst: int
    num_tokens: int


@dataclass(slots=True, frozen=True)
class BlockMove:
    """A whole block between the tiers: device block, host block."""

    device: int
    host: int
