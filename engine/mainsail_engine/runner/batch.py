"""One step's inputs as arrays, from its plan: a Python loop over requests, none over tokens.

    chunks        [ d0 | d1 | d2 | prefill chunk of r3 ......... | prefill chunk of r4 ... ]
    query_start     0    1    2    3                              ...
    sampled rows    0    1    2    the last row of each chunk that samples

A chunk that verifies guesses has a row for each and samples all of them. It is one sequence like a chunk of a prompt
(its context is read once), or, spread, as many decodes as it has rows, which share a block table and see one position
more each (their contexts are read side by side, by as many programs as that takes).

    sequences     [ d0 | d1 | v2: token, guess, guess | r3 … ]     spread  [ d0 | d1 | v2 | v2 | v2 | r3 … ]

Block tables live in one row per slot and are extended when a request's own list has grown; a slot's row is written
anew when another request (or the same one after a preemption) moves in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mainsail_engine.chunking import attention_pairs
from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.request import Request
from mainsail_engine.step import Chunk, StepPlan
from mainsail_kernels.kv_transpose import PAYING_PAIRS, are_transposed
from mainsail_kernels.lora import tiles_of

TRANSPOSE_ROWS = 256
"""Of a step in which values may be transposed, at least: smaller ones have no time to win it back."""


def _none() -> np.ndarray:
    return np.empty(0, np.int32)


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
    first_rows: np.ndarray
    """[num_chunks] int64: the first row of each chunk of the plan."""
    num_decodes: int
    """Sequences of one row each, which come first."""
    max_query_len: int
    adapter_rows: np.ndarray = field(default_factory=_none)
    """[num_tiles * 16] int32: rows by the LoRA adapter that they go through (`mainsail_kernels.lora.tiles_of`)."""
    adapter_slots: np.ndarray = field(default_factory=_none)
    """[num_tiles] int32: whose rows a tile's are. Empty: no row goes through an adapter."""

    def transposes_values(self) -> bool:
        """Whether transposing the values of an FP8 cache for its chunks pays (`mainsail_kernels.kv_transpose`)."""
        if len(self.token_ids) < TRANSPOSE_ROWS:
            return False
        tokens = np.diff(self.query_start[self.num_decodes :]).tolist()
        ends = self.seq_lens[self.num_decodes :].tolist()
        chunks = zip(ends, tokens, are_transposed(tokens), strict=True)
        return sum(attention_pairs(end - n, n) for end, n, is_transposed in chunks if is_transposed) >= PAYING_PAIRS

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
        known, length = self._known[slot], len(blocks)
        first, same = 0, False
        if known is not None and known[0] is request and known[2] is blocks:
            first, same = known[3], known[1] == request.num_preemptions and known[3] <= length
        if same and first == length:
            return False
        if not same:
            first = 0
        self.rows[slot, first:length] = blocks[first:]
        self._known[slot] = (request, request.num_preemptions, blocks, length)
        return not same


def build(
    plan: StepPlan, tables: BlockTables, *, spread: bool = False, adapters: bool = False
) -> tuple[StepArrays, list[Chunk]]:
    """The arrays of a plan, and the chunks whose slot has a new tenant.

    spread: rows of guesses as decodes. adapters: rows may go through some.
    """
    chunks = plan.chunks
    moved_in = [chunk for chunk in chunks if tables.update(chunk)]
    lengths, starts, slots, num_sampled = _numbers(chunks)
    first_rows = _running(lengths)
    slot_of_row = slots.repeat(lengths)
    positions: np.ndarray = np.arange(len(slot_of_row)) + (starts - first_rows[:-1]).repeat(lengths)
    slot_mapping: np.ndarray = tables.rows[slot_of_row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    token_ids, from_device = _token_ids(chunks)
    from_slots, last_rows = slots[from_device], first_rows[1:][from_device] - 1
    sampled = _sampled_rows(num_sampled, first_rows)
    sampled_slots, query_start, seq_lens = slot_of_row[sampled], first_rows, starts + lengths
    num_decodes, max_query_len = plan.num_decodes, int(lengths.max())
    if spread and plan.num_verifying:
        first = num_decodes + plan.num_verifying  # of the chunks that stay as they are
        num_decodes, max_query_len = int(first_rows[first]), int(lengths[first:].max(initial=1))
        query_start = np.concatenate((np.arange(num_decodes), first_rows[first:]))
        seq_lens = np.concatenate((positions[:num_decodes] + 1, seq_lens[first:]))
        slots = np.concatenate((slot_of_row[:num_decodes], slots[first:]))
    used = -(-int(seq_lens.max()) // BLOCK_SIZE)
    block_tables = tables.rows[slots, :used]
    adapter_rows, adapter_slots = _adapter_tiles(chunks) if adapters else (_none(), _none())
    arrays = StepArrays(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        query_start=query_start.astype(np.int32),
        seq_lens=seq_lens.astype(np.int32),
        block_tables=block_tables,
        slots=slots,
        from_device=last_rows,
        from_slots=from_slots,
        sampled=sampled,
        sampled_slots=sampled_slots,
        first_rows=first_rows[:-1],
        num_decodes=num_decodes,
        max_query_len=max_query_len,
        adapter_rows=adapter_rows,
        adapter_slots=adapter_slots,
    )
    return arrays, moved_in


def _adapter_tiles(chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    slots = np.array([chunk.request.adapter_slot for chunk in chunks], np.int64)
    if (slots < 0).all():
        return _none(), _none()
    return tiles_of(np.repeat(slots, [chunk.num_tokens for chunk in chunks]))


def _running(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths to [n + 1] int64: where each begins, and where the last ends."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _numbers(chunks: list[Chunk]) -> np.ndarray:
    """[4, num_chunks] int64: how long each is, where it starts, its slot, and how many of its rows are sampled."""
    numbers = list[int]()
    for chunk in chunks:
        numbers += (chunk.num_tokens, chunk.start, chunk.slot, chunk.samples + len(chunk.guesses))
    return np.array(numbers, np.int64).reshape(-1, 4).T


def _sampled_rows(counts: np.ndarray, first_rows: np.ndarray) -> np.ndarray:
    """The last so many rows of each chunk: one where it samples, and where it verifies guesses all."""
    ends = _running(counts)
    rows: np.ndarray = np.arange(int(ends[-1]))
    if len(rows) == first_rows[-1]:
        return rows
    return rows + (first_rows[1:] - ends[1:]).repeat(counts)


def _token_ids(chunks: list[Chunk]) -> tuple[np.ndarray, list[int]]:
    """(token ids, which chunks end with a token that only the device knows yet)."""
    token_ids = list[int]()
    from_device = list[int]()
    for index, chunk in enumerate(chunks):
        request = chunk.request
        if chunk.guesses:  # a decode: it begins with the newest token
            token_ids.append((request.output_token_ids or request.prompt_token_ids)[-1])
            token_ids += chunk.guesses
            continue
        known = request.token_ids(chunk.start, min(chunk.start + chunk.num_tokens, request.num_tokens))
        token_ids += known
        if missing := chunk.num_tokens - len(known):
            token_ids += [0] * missing
            from_device.append(index)
    return np.array(token_ids, np.int64), from_device
