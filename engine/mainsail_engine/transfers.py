"""Large copies between host and device at the speed of the bus, though the host's memory is not pinned.

    file or memory ──thread──▶ pinned piece ──stream──▶ device        16 threads, each with two pieces and a stream

The bus needs pinned memory, and pinning takes longer than copying. So a few pinned pieces are filled (or emptied) by
threads, which also share the work of taking new pages and of reading files, while others' pieces are on the bus. Pieces
are large, because between two of them a thread needs Python's lock, which the others want too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from mainsail_engine.pages import touched_zeros
from mainsail_engine.pinned import pin, unpin

THREADS = min(16, os.cpu_count() or 1)
PIECE_BYTES = 16 << 20

Fill = Callable[[np.ndarray, int], None]
"""(buffer [n] uint8, offset): write the n bytes from that offset on into the buffer."""


class _Piece:
    def __init__(self) -> None:
        self.memory = touched_zeros(PIECE_BYTES)  # the pages are there before they are pinned
        pin(self.memory)
        self.bytes: np.ndarray = self.memory.numpy()
        self.sent = torch.cuda.Event()


class _Lane(threading.local):
    """What a thread has of its own."""

    stream: torch.cuda.Stream
    pieces: list[_Piece]


class Transfers:
    """A context: its threads end, and its pinned memory goes, with it. One caller at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lane = _Lane()
        self._pieces: list[_Piece] = []
        self._streams: list[torch.cuda.Stream] = []
        self._running: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(THREADS, "transfer", self._begin)

    def __enter__(self) -> Transfers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        torch.cuda.synchronize(self._device)
        for piece in self._pieces:
            unpin(piece.memory)

    def _begin(self) -> None:
        torch.cuda.set_device(self._device)
        self._lane.stream = torch.cuda.Stream(self._device)
        self._streams.append(self._lane.stream)
        self._lane.pieces = [_Piece(), _Piece()]
        self._pieces.extend(self._lane.pieces)

    def fill(self, target: torch.Tensor, fill: Fill) -> None:
        """Begin to write to target [n] uint8 on the device what `fill` gives, in the order of the current stream.

        The target may be used after `wait`.
        """
        began = self._now()

        def one(offset: int) -> None:
            piece = self._next_piece()
            part = target[offset : offset + PIECE_BYTES]
            fill(piece.bytes[: len(part)], offset)
            with torch.cuda.stream(self._lane.stream):
                self._lane.stream.wait_event(began)
                part.copy_(piece.memory[: len(part)], non_blocking=True)
                piece.sent.record()

        self._begin_all(one, len(target))

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy source [n] uint8 on the host to target [n] uint8 on the device; see `fill`."""
        held: np.ndarray = source.numpy()

        def read(buffer: np.ndarray, offset: int) -> None:
            np.copyto(buffer, held[offset : offset + len(buffer)])

        self.fill(target, read)

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy source [n] uint8 on the device to target [n] uint8 on the host: it is there after `wait`."""
        began = self._now()
        written: np.ndarray = target.numpy()

        def one(offset: int) -> None:
            piece = self._next_piece()
            part = source[offset : offset + PIECE_BYTES]
            with torch.cuda.stream(self._lane.stream):
                self._lane.stream.wait_event(began)
                piece.memory[: len(part)].copy_(part, non_blocking=True)
                piece.sent.record()
            piece.sent.synchronize()
            np.copyto(written[offset : offset + len(part)], piece.bytes[: len(part)])

        self._begin_all(one, len(source))

    def wait(self) -> None:
        """Until everything begun was read, and the current stream waits for what is on the bus. Raises what failed."""
        current = torch.cuda.current_stream(self._device)
        running, self._running = self._running, []
        for future in running:
            future.result()
        for stream in self._streams:
            current.wait_stream(stream)

    def _begin_all(self, one: Callable[[int], None], num_bytes: int) -> None:
        self._running += [self._pool.submit(one, offset) for offset in range(0, num_bytes, PIECE_BYTES)]

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _next_piece(self) -> _Piece:
        """The thread's piece that was used longest ago, once the bus is done with it."""
        self._lane.pieces.reverse()
        piece = self._lane.pieces[0]
        piece.sent.synchronize()
        return piece
