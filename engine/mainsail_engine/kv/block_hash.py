"""The name of a full block outside of the engine: a hash of its tokens, all before them, and the tenant's salt.

Chained, so that equal hashes mean equal beginnings; 64 bits of SHA-256. The prefix cache's events (events.py) and the
heads of answers (server/told_blocks.py) name blocks by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from mainsail_engine.kv.packed_tokens import KEY_BYTES, pack_tokens


def first_digest(salt: str) -> bytes:
    """What stands before the first block."""
    return hashlib.sha256(salt.encode()).digest()


def next_digest(before: bytes, key: bytes) -> bytes:
    """Of the block with these packed tokens (`pack_tokens`) after what `before` stands for."""
    return hashlib.sha256(before + key).digest()


def number_of(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def block_hashes(token_ids: Sequence[int], salt: str) -> Iterator[int]:
    """Of each full block, in order."""
    packed, digest = pack_tokens(token_ids), first_digest(salt)
    for position in range(0, len(packed) - KEY_BYTES + 1, KEY_BYTES):
        digest = next_digest(digest, packed[position : position + KEY_BYTES])
        yield number_of(digest)
