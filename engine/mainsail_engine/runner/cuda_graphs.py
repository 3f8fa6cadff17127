"""Steps in padded shapes, each captured as one CUDA graph: the forward pass, the greedy choice and the note of it.

Launching a forward pass kernel by kernel takes the host longer than the device needs for a small step, so every step
of decodes only, and every small mixed one, is padded to the next of a few shapes and replayed. A shape is a number of
token rows; what the rows are (so many decodes, then chunks of so many prompts) is data:

    rows      [ d0 d1 d2 | chunk of r3 ........ | chunk of r4 ... | padding ]       padding writes no KV (slot -1)
    decodes   the first D rows, those past the real ones of length 0; chunks' attention writes those rows afterwards
    sampled   one row for each sequence that samples, then padding: its tokens go to a spare row of `newest`

All inputs of a step are int32 numbers in one pinned buffer, which a kernel reads, block tables last:

    token | from slot | position | KV slot | lengths | chunk starts | sampled rows | their slots | adapters | tables

Steps with rows of LoRA adapters have shapes of their own, with room for as many tiles of rows (`mainsail_kernels.lora`)
as so many rows can make: which row goes through which adapter, if through any, is data too. Those without are spared
the kernels. So have, with a cache in FP8, steps in which much of prompts' attention is in long chunks, whose values are
transposed first (`mainsail_kernels.kv_transpose`): that is other kernels.

With graphs off the same shapes run kernel by kernel: the arithmetic is the same, so the tokens are.

Shapes are captured from large to small out of one memory pool, so that the small reuse the large's. That goes for their
logits, too, most of what steps take, so a step's lie where any other step may write from its beginning on. They may be
read by what is queued on the same stream before the next step is, and by nothing else; the next may be of the same
shape, so it was never otherwise. Who samples later (a constrained row waits for its mask) does so before the next step
is launched: EngineCore has one such step at most, and samples it first. The tokens of each shape are its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch

from mainsail_engine.chunking import STEP_ROWS
from mainsail_engine.config import MAX_SPECULATIVE_ROWS, MAX_SPECULATIVE_TOKENS
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.lora import AdapterRows
from mainsail_engine.runner.batch import TRANSPOSE_ROWS, StepArrays
from mainsail_engine.runner.uploads import Uploads
from mainsail_kernels.attention_decode import DecodeWorkspace
from mainsail_kernels.lora import TILE, most_tiles
from mainsail_kernels.tokens import note, resolve, unpack

log = logging.getLogger(__name__)
LARGEST_DECODE = 1024
LARGEST_MIXED = STEP_ROWS[-1]
"""Tokens. Larger steps keep the device busy for longer than it takes to launch them, but of models that are small …"""
LARGE_ROWS = (1792, 2048, 2304, 2560, 3072, 4096, 6144, 8192)
"""… or fast, of which there are shapes of these rows, too, as long as that is not so."""
LAYER_LAUNCH_S = 750e-6
"""What a layer launched kernel by kernel takes the host: 20 ms a step of 32 layers, beside an H200, and 3 to 4 of what
else it does for a step."""
FLOPS = 7e14
"""Operations a second of large products in 16 bits, on the same. Of those in FP8 twice as many."""
VERIFY_ROWS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, MAX_SPECULATIVE_ROWS)
"""Of steps that verify guesses as chunks."""
FEW_GUESSES = 7
"""Where every request has some, and none has more, attention's tiles are smaller, and no decode is looked for."""
LARGEST_STEP = max(LARGEST_DECODE, LARGEST_MIXED, MAX_SPECULATIVE_ROWS)
"""Rows."""
MOST_CHUNKS = 32
"""Prompts in a mixed step that is replayed."""
FEW_DECODES = 64
"""Mixed steps of so many decodes at most have shapes of their own. Each row of a decode that there may be costs its
place in attention's grid, and each that may be sampled the head: with room for 256, 64 decodes beside 256 tokens of
prompts take 12.3 ms on an H200, of which 0.6 to 0.8 are for nobody."""
LARGEST_FEW = 768
"""Tokens of such a shape: where more is computed, that share is small."""

Forward = Callable[[torch.Tensor, Attention], torch.Tensor]
"""(token ids or a stage's incoming hidden states, attention) to the wanted rows' hidden states."""
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepShape:
    """A padded step. Of decodes only: tokens == decodes == sampled, and no chunks."""

    tokens: int
    decodes: int
    chunks: int
    sampled: int
    longest: int = 0
    """Rows of the longest chunk, where chunks verify guesses and every row is sampled. 0: as long as the step."""
    tiles: int = 0
    """Of rows that go through adapters. 0: none does."""
    transposes: bool = False
    """Long chunks' values of an FP8 cache are transposed."""

    @property
    def is_mixed(self) -> bool:
        return self.chunks > 0


def decode_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then every 8, every 16 from 64, every 64 from 256; the last is `largest`, at most 1,024."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, LARGEST_DECODE + 1, 64)]
    return [size for size in sizes if size < largest] + [min(largest, LARGEST_DECODE)]


def step_rows(architecture: Architecture, *, fp8: bool = False) -> tuple[int, ...]:
    """Rows of the mixed shapes: those after which a step keeps the device busy longer than the host, and no more.

    fp8: products of many rows are computed in FP8."""
    a = architecture
    channels = a.intermediate_size
    if a.experts is not None:
        channels = a.experts.experts_per_token * a.experts.intermediate_size
    heads = (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    row_s = 2 * a.hidden_size * (heads + 3 * channels) / (2 * FLOPS if fp8 else FLOPS)
    return STEP_ROWS + tuple(n for n in LARGE_ROWS if n * row_s < LAYER_LAUNCH_S)


class ShapeOptions(TypedDict):
    """What else decides which shapes there are."""

    guess_rows: int
    adapter_slots: int
    mixed_rows: Sequence[int]


def shapes_of(
    max_num_seqs: int,
    *,
    guess_rows: int = 0,
    adapter_slots: int = 0,
    mixed_rows: Sequence[int] = STEP_ROWS,
    transposes: bool = False,
) -> list[StepShape]:
    """Every shape, from small to large within its kind; decodes first, then those that verify guesses, of up to
    guess_rows rows, then mixed ones, then the large of these again if there is a cache whose values are transposed
    for them; then, where there are slots for adapters, all again with room for their rows."""
    decodes = [StepShape(n, n, 0, n) for n in decode_sizes(max_num_seqs)]
    mixed = [shape for n in mixed_rows for shape in _mixed(n, min(n, max_num_seqs))]
    rows = [n for n in VERIFY_ROWS if n < guess_rows] + ([guess_rows] if guess_rows else [])
    verify = [shape for n in rows for shape in _verifying(n, min(n, max_num_seqs))]
    large = [shape for shape in mixed if transposes and shape.tokens >= TRANSPOSE_ROWS]
    shapes = decodes + verify + mixed + [replace(shape, transposes=True) for shape in large]
    adapted = [replace(shape, tiles=most_tiles(shape.tokens, adapter_slots)) for shape in shapes]
    return shapes + adapted if adapter_slots else shapes


def _verifying(tokens: int, most: int) -> list[StepShape]:
    """The shapes of so many rows that verify guesses, of up to `most` sequences: all with a few each, then any."""
    few = StepShape(tokens, 0, most, tokens, 1 + FEW_GUESSES)
    return [few, StepShape(tokens, most, most, tokens, 1 + MAX_SPECULATIVE_TOKENS)]


def _mixed(tokens: int, most: int) -> list[StepShape]:
    """The mixed shapes of so many rows, of which at most `most` are sampled."""
    chunks = min(most, MOST_CHUNKS)
    few = StepShape(tokens, FEW_DECODES, chunks, FEW_DECODES + chunks)
    every = StepShape(tokens, most, chunks, most)
    return [few, every] if few.sampled < most and tokens <= LARGEST_FEW else [every]


def graph_bytes(architecture: Architecture, shapes: Sequence[StepShape]) -> int:
    """What the graphs of all shapes take together, roughly: the most logits that one has, three times, since a soft cap
    and parts from other ranks are made by way of others, and the widest activations."""
    a = architecture
    logits = 3 * 2 * a.vocab_size * max(shape.sampled for shape in shapes)
    activations = 2 * max(shape.tokens for shape in shapes) * (4 * a.intermediate_size + 8 * a.hidden_size)
    return logits + activations + (256 << 20)


class _Place:
    """Where a tensor lies, in the words in which libraries tell one another of a GPU's memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        strides = tuple(size * stride for stride in tensor.stride())
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "strides": strides, "typestr": f"<i{size}",
            "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers on a GPU, whose memory others may have once `tensor` is gone."""
    return torch.as_tensor(_Place(tensor), device=tensor.device).view(tensor.dtype)


@dataclass(slots=True)
class Layout:
    """Where a shape's inputs lie in the packed upload, in int32 numbers."""

    token: slice
    from_slot: slice
    position: slice
    kv_slot: slice
    lengths: slice
    starts: slice
    sampled: slice
    sampled_slots: slice
    adapter_rows: slice
    adapter_slots: slice
    tables: int
    """Where the block tables begin."""

    @classmethod
    def of(cls, shape: StepShape) -> Layout:
        at = 0

        def part(count: int) -> slice:
            nonlocal at
            first, at = at, at + -(-count // 4) * 4  # kernels load 16 bytes at a time
            return slice(first, first + count)

        return cls(
            token=part(shape.tokens),
            from_slot=part(shape.tokens),
            position=part(shape.tokens),
            kv_slot=part(shape.tokens),
            lengths=part(shape.decodes + shape.chunks),
            starts=part(shape.chunks + 1),
            sampled=part(shape.sampled),
            sampled_slots=part(shape.sampled),
            adapter_rows=part(TILE * shape.tiles),
            adapter_slots=part(shape.tiles),
            tables=at,
        )


def pack(packed: np.ndarray, layout: Layout, shape: StepShape, arrays: StepArrays, spare_slot: int) -> None:
    """A step's inputs, padded to the shape, into int32 numbers. Pure: the block tables follow unpadded."""
    n, seqs, sampled = len(arrays.token_ids), len(arrays.slots), len(arrays.sampled)
    _fill(packed[layout.token], arrays.token_ids, n, 0)
    packed[layout.from_slot] = -1
    packed[layout.from_slot][arrays.from_device] = arrays.from_slots
    _fill(packed[layout.position], arrays.positions, n, 0)
    _fill(packed[layout.kv_slot], arrays.slot_mapping, n, -1)
    decodes = arrays.num_decodes
    lengths = packed[layout.lengths]
    _fill(lengths[: shape.decodes], arrays.seq_lens[:decodes], decodes, 0)
    _fill(lengths[shape.decodes :], arrays.seq_lens[decodes:], seqs - decodes, 0)
    _fill(packed[layout.starts], arrays.query_start[decodes:], seqs - decodes + 1, n)
    _fill(packed[layout.sampled], arrays.sampled, sampled, 0)
    _fill(packed[layout.sampled_slots], arrays.sampled_slots, sampled, spare_slot)
    _fill(packed[layout.adapter_rows], arrays.adapter_rows, len(arrays.adapter_rows), -1)
    _fill(packed[layout.adapter_slots], arrays.adapter_slots, len(arrays.adapter_slots), -1)
    tables = packed[layout.tables : layout.tables + arrays.block_tables.size]
    tables.reshape(arrays.block_tables.shape)[...] = arrays.block_tables


def _fill(target: np.ndarray, values: np.ndarray, count: int, padding: int) -> None:
    target[:count] = values
    target[count:] = padding


class PaddedSteps:
    """The shapes of steps, captured or not."""

    def __init__(
        self,
        forward: Forward,
        logits: Logits | None,
        greedy: Logits,
        newest: torch.Tensor,
        uploads: Uploads,
        *,
        workspace: DecodeWorkspace | None,
        room: torch.Tensor | None = None,
        max_num_seqs: int,
        max_blocks: int,
        capture: bool,
        guess_rows: int = 0,
        adapter_slots: int = 0,
        mixed_rows: Sequence[int] = STEP_ROWS,
        incoming: torch.Tensor | None = None,
    ) -> None:
        """newest [num_slots + 1] int64 holds every slot's newest token; its last row belongs to padding.

        logits None: of a pipeline stage that is not the last, a step gives its hidden states. incoming [LARGEST_STEP,
        hidden_size]: where a stage that is not the first finds a step's inputs; None: they are token ids. room: where
        values of the cache are transposed; None: no step does that.
        """
        self.incoming = incoming
        self._forward, self._logits, self._greedy = forward, logits, greedy
        self._newest, self._uploads, self._workspace = newest, uploads, workspace
        self._room = room
        self._spare_slot = newest.shape[0] - 1
        self._shapes = shapes_of(
            max_num_seqs, guess_rows=guess_rows, adapter_slots=adapter_slots, mixed_rows=mixed_rows,
            transposes=room is not None,
        )  # fmt: skip
        self._layouts = {shape: Layout.of(shape) for shape in self._shapes}
        rows = max(shape.decodes + shape.chunks for shape in self._shapes)
        numbers = max(layout.tables for layout in self._layouts.values()) + rows * max_blocks
        self._packed = torch.zeros(numbers, dtype=torch.int32, device=newest.device)
        self._heads = {shape: self._packed[: layout.tables] for shape, layout in self._layouts.items()}
        self._tables = torch.zeros((rows, max_blocks), dtype=torch.int32, device=newest.device)
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        if capture:
            self._capture_all()

    def _capture_all(self) -> None:
        started = time.perf_counter()
        before = torch.cuda.memory_reserved()
        last: torch.cuda.CUDAGraph | None = None
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(self._newest.device)):
            for shape in sorted(self._shapes, key=lambda s: (s.sampled, s.tokens), reverse=True):
                self._graphs[shape] = self._capture(shape, last)
                last = self._graphs[shape][0]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of what ran outside the captures
        seconds, taken = time.perf_counter() - started, torch.cuda.memory_reserved() - before
        log.info("captured %d CUDA graphs in %.1f s, %d MiB", len(self._shapes), seconds, taken >> 20)

    def _capture(
        self, shape: StepShape, before: torch.cuda.CUDAGraph | None
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """(the graph, where it leaves its logits, its tokens), out of the memory of the one before."""
        self._blank(shape)
        self._run(shape)  # compiles what is not compiled yet, outside the capture
        graph = torch.cuda.CUDAGraph()  # not torch.cuda.graph, which gives cached memory back for each anew
        pool = () if before is None else (before.pool(),)
        graph.capture_begin(*pool, capture_error_mode="thread_local")  # NCCL's watchdog goes on
        logits, tokens = self._run(shape)
        graph.capture_end()
        return graph, logits if self._logits is None else unowned(logits), tokens

    def run_all(self) -> None:
        """Every shape once, with nothing but padding."""
        for shape in self._shapes:
            self._blank(shape)
            self._run(shape)

    def _blank(self, shape: StepShape) -> None:
        """Nothing but padding."""
        layout = self._layouts[shape]
        self._packed.zero_()
        self._packed[layout.from_slot] = -1
        self._packed[layout.kv_slot] = -1
        self._packed[layout.sampled_slots] = self._spare_slot
        self._packed[layout.adapter_rows] = -1
        self._packed[layout.adapter_slots] = -1

    def _run(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        layout, packed = self._layouts[shape], self._packed
        inputs = self._inputs(shape)
        attention = Attention(
            positions=packed[layout.position],
            slot_mapping=packed[layout.kv_slot],
            block_tables=self._tables[: shape.decodes + shape.chunks],
            chunk_start=packed[layout.starts],
            seq_lens=packed[layout.lengths],
            num_decodes=shape.decodes,
            max_query_len=shape.longest or shape.tokens,
            workspace=self._workspace,
            room=self._room if shape.transposes else None,
            adapters=AdapterRows(packed[layout.adapter_rows], packed[layout.adapter_slots]) if shape.tiles else None,
            wanted=packed[layout.sampled] if shape.is_mixed and self._logits is not None else None,
        )
        hidden = self._forward(inputs, attention)
        if self._logits is None:
            return hidden, hidden
        logits = self._logits(hidden)
        tokens = self._greedy(logits)
        note(self._newest, packed[layout.sampled_slots], tokens)
        return logits, tokens

    def _inputs(self, shape: StepShape) -> torch.Tensor:
        if self.incoming is not None:
            return self.incoming[: shape.tokens]
        layout, packed = self._layouts[shape], self._packed
        return resolve(packed[layout.token], packed[layout.from_slot], self._newest)

    def shape_for(self, arrays: StepArrays) -> StepShape | None:
        """The smallest shape that holds the step. None: it is too large, of too many prompts, or samples too much."""
        n, chunks = len(arrays.token_ids), len(arrays.slots) - arrays.num_decodes
        tiles = len(arrays.adapter_slots)
        transposes = self._room is not None and arrays.transposes_values()
        for shape in self._shapes:
            if (shape.tiles > 0) != (tiles > 0) or shape.transposes != transposes:
                continue
            fits = shape.decodes >= arrays.num_decodes and shape.sampled >= len(arrays.sampled)
            fits = fits and (not shape.longest or shape.longest >= arrays.max_query_len)
            if fits and shape.tokens >= n and shape.is_mixed == (chunks > 0) and shape.chunks >= chunks:
                return shape
        return None

    def launch(self, shape: StepShape, arrays: StepArrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue the step: the (logits, greedy tokens) of its sampled rows, which the next step overwrites, the logits
        from its beginning on; in a stage that does not sample, its hidden states twice."""
        layout, decodes = self._layouts[shape], arrays.num_decodes
        seqs, used = arrays.block_tables.shape
        numbers = layout.tables + seqs * used
        staging = self._uploads.staging(4 * numbers)
        pack(staging.int32, layout, shape, arrays, self._spare_slot)
        unpack(
            staging.numbers(numbers), self._heads[shape], self._tables,
            width=used, decodes=decodes, gap=shape.decodes - decodes if seqs > decodes else 0,
        )  # fmt: skip
        staging.is_read()
        if shape in self._graphs:
            graph, logits, tokens = self._graphs[shape]
            graph.replay()
        else:
            logits, tokens = self._run(shape)
        count = len(arrays.token_ids) if self._logits is None else len(arrays.sampled)
        return (logits, tokens) if count == len(tokens) else (logits[:count], tokens[:count])
