"""A rank's process as its parent sees it: its orders in, its words out. Nothing here imports torch.

Orders are one line of JSON on its standard input, which stays open for as long as the parent lives. Where the parent
listens (server/node.py), the rank says on its standard output every second that it lives, and why it ends.
"""

from __future__ import annotations

import subprocess

import msgspec

from mainsail_engine.child import start_child
from mainsail_engine.config import EngineConfig


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """The one line of JSON on a worker's standard input."""

    config: EngineConfig
    rank: int
    host: str
    """Where the leader's store is."""
    port: int
    is_listened_to: bool = False
    """Its words are read."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """It lives: said at the start, every second, and when it has loaded."""

    has_loaded: bool
    """Its share of the model; it follows the leader."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """It cannot go on, or could not start: a stable reason, and a message."""

    reason: str
    message: str


decode_words = msgspec.json.Decoder(Alive | Ended).decode
encode_words = msgspec.json.Encoder().encode


def spawn(start: WorkerStart) -> subprocess.Popen[bytes]:
    """The process of a rank above 0, which ends when this one does. Raises OSError where none can be had."""
    return start_child(
        "mainsail_engine.runner.tp_worker", start, stdout=subprocess.PIPE if start.is_listened_to else None
    )
