"""One step's inputs as arrays, from its plan: a Python loop over requests, none over tokens.

    chunks        [ d0 | d1 | d2 | prefill chunk of r3 ......... | prefill chunk of r4 ... ]
    query_start     0    1    2    3                              ...
    sampled rows    0    1    2    the last row of each chunk that samples

Block tables live in one row per slot and are extended when a request's own list has grown; a slot's row is written
anew when another request (or the same one after a preemption) moves in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.request import Request
from mainsail_engine.step import Chunk, StepPlan


@dataclass(slots=True)
class StepArrays:
    token_ids: np.ndarray
    """[num_tokens] int64; 0 where the token is still on the device."""
    positions: np.ndarray
    """[num_tokens] int64."""
    slot_mapping: np.ndarray
    """[num_tokens] int64."""
    query_start: np.ndarray
    """[num_seqs + 1] int32."""
    seq_lens: np.ndarray
    """[num_seqs] int32."""
    block_tables: np.ndarray
    """[num_seqs, longest table of the step] int32."""
    slots: np.ndarray
    """[num_seqs] int64."""
    from_device: np.ndarray
    """[num_from_device] int64: rows of token_ids whose token is the newest of their slot, on the device."""
    from_slots: np.ndarray
    """[num_from_device] int64: those slots."""
    sampled: np.ndarray
    """[num_sampled] int64: rows whose logits are sampled."""
    sampled_slots: np.ndarray
    """[num_sampled] int64."""
    num_decodes: int
    max_query_len: int

    def from_slots_of_rows(self) -> np.ndarray:
        """[num_tokens] int64: the slot whose newest token a row takes, -1 where token_ids has it."""
        slots = np.full(len(self.token_ids), -1, np.int64)
        slots[self.from_device] = self.from_slots
        return slots


class BlockTables:
    """Every slot's block table, [num_slots, max_blocks] int32, kept up with the requests' own lists."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.rows = np.zeros((num_slots, max_blocks), np.int32)
        self._known: list[tuple[Request, int, list[int], int] | None] = [None] * num_slots

    def update(self, chunk: Chunk) -> bool:
        """Bring the chunk's row up to date. True: the slot has a new tenant."""
        slot, request, blocks = chunk.slot, chunk.request, chunk.block_ids
        known = self._known[slot]
        same = (
            known is not None
            and known[0] is request
            and known[1] == request.num_preemptions
            and known[2] is blocks
            and known[3] <= len(blocks)
        )
        first = known[3] if same and known is not None else 0
        if first < len(blocks):
            self.rows[slot, first : len(blocks)] = blocks[first:]
        self._known[slot] = (request, request.num_preemptions, blocks, len(blocks))
        return not same


def build(plan: StepPlan, tables: BlockTables) -> tuple[StepArrays, list[Chunk]]:
    """The arrays of a plan, and the chunks whose slot has a new tenant."""
    chunks = plan.chunks
    moved_in = [chunk for chunk in chunks if tables.update(chunk)]
    lengths = np.array([chunk.num_tokens for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    slots = np.array([chunk.slot for chunk in chunks], np.int64)
    query_start = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(lengths, out=query_start[1:])
    seq_of_token = np.repeat(np.arange(len(chunks)), lengths)
    positions: np.ndarray = np.arange(int(query_start[-1])) - query_start[seq_of_token] + starts[seq_of_token]
    seq_lens = starts + lengths
    used = int(-(-seq_lens.max() // BLOCK_SIZE))
    block_tables = tables.rows[slots, :used]
    slot_mapping: np.ndarray = block_tables[seq_of_token, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
    slot_mapping += positions % BLOCK_SIZE
    token_ids, from_device = _token_ids(chunks, query_start)
    samples = np.array([chunk.samples for chunk in chunks], bool)
    arrays = StepArrays(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        query_start=query_start.astype(np.int32),
        seq_lens=seq_lens.astype(np.int32),
        block_tables=block_tables,
        slots=slots,
        from_device=query_start[1:][from_device] - 1,
        from_slots=slots[from_device],
        sampled=query_start[1:][samples] - 1,
        sampled_slots=slots[samples],
        num_decodes=plan.num_decodes,
        max_query_len=int(lengths.max()),
    )
    return arrays, moved_in


def _token_ids(chunks: list[Chunk], query_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, which chunks end with a token that only the device knows yet)."""
    token_ids = np.zeros(int(query_start[-1]), np.int64)
    from_device = np.zeros(len(chunks), bool)
    for index, chunk in enumerate(chunks):
        stop = chunk.start + chunk.num_tokens
        known = chunk.request.token_ids(chunk.start, min(stop, chunk.request.num_tokens))
        first = int(query_start[index])
        token_ids[first : first + len(known)] = known
        from_device[index] = len(known) < chunk.num_tokens
    return token_ids, from_device
