"""Token ids as bytes: what the prefix tree compares and looks up, and block hashes are made of."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from mainsail_engine.config import BLOCK_SIZE

TOKEN_BYTES = 4
KEY_BYTES = BLOCK_SIZE * TOKEN_BYTES


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as big-endian 32-bit words, so that byte order is token order."""
    words = array("I", token_ids)
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    words = array("I", packed)
    if sys.byteorder == "little":
        words.byteswap()
    return words.tolist()


def common_tokens(left: bytes, right: bytes) -> int:
    """How many leading tokens two packed sequences share."""
    size = min(len(left), len(right))
    differing = int.from_bytes(left[:size], "big") ^ int.from_bytes(right[:size], "big")
    return (size * 8 - differing.bit_length()) // 8 // TOKEN_BYTES
