"""CUDA graphs for decode steps: the whole forward pass, the greedy choice and the note of it as one launch.

A step of decodes only is padded to the next captured batch size and replayed. Its inputs are one packed upload of
INPUTS int64 rows and the step's block tables; a padding row writes no KV (slot -1), sees no context (length 0) and
notes its token in the spare row behind the last slot.

    packed (pinned, two in turn) ──copy──▶ inputs ─▶ token ids ─▶ forward ─▶ logits ─▶ greedy ─▶ newest[slots]
                                             ▲ newest[slots], where the token is on the device only

Two pinned buffers take turns; each has an event that says when its last upload has been read, so that step N+1 can be
packed while N runs. Sizes are captured from large to small out of one memory pool, so that the small reuse the large's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.runner.batch import StepArrays
from mainsail_kernels.attention_decode import DecodeWorkspace

INPUTS = 6
TOKEN, FROM_DEVICE, POSITION, KV_SLOT, LENGTH, SLOT = range(INPUTS)

Forward = Callable[[torch.Tensor, Attention], torch.Tensor]
"""(token ids, attention) to logits [n, vocab]."""


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 64, 96 … 256, then every 128; the last one is `largest` itself."""
    sizes = [1, 2, 4, 8, 16, 32, *range(64, 257, 32), *range(384, 1025, 128)]
    return [size for size in sizes if size < largest] + [min(largest, 1024)]


def graph_bytes(architecture: Architecture, largest: int) -> int:
    """What the graphs of all sizes take together, roughly: a step's logits twice and its widest activations."""
    a = architecture
    return largest * (8 * a.vocab_size + 16 * (a.intermediate_size + a.hidden_size)) + (256 << 20)


class _Staging:
    """One pinned set of a step's inputs."""

    def __init__(self, rows: int, blocks: int) -> None:
        self.packed = torch.empty(INPUTS * rows, dtype=torch.int64, pin_memory=True)
        self.tables = torch.empty(rows * blocks, dtype=torch.int32, pin_memory=True)
        self.read = torch.cuda.Event()


class DecodeGraphs:
    def __init__(
        self, forward: Forward, newest: torch.Tensor, greedy: Callable[[torch.Tensor], torch.Tensor],
        *, workspace: DecodeWorkspace | None, largest: int, max_blocks: int,
    ) -> None:  # fmt: skip
        """newest [num_slots + 1] int64 holds every slot's newest token; its last row belongs to padding."""
        self._forward, self._newest, self._greedy = forward, newest, greedy
        self._workspace = workspace
        self._spare_slot = newest.shape[0] - 1
        self.sizes = batch_sizes(largest)
        rows, device = self.sizes[-1], newest.device
        self._inputs = {n: torch.zeros((INPUTS, n), dtype=torch.int64, device=device) for n in self.sizes}
        self._tables = torch.zeros((rows, max_blocks), dtype=torch.int32, device=device)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._stagings = (_Staging(rows, max_blocks), _Staging(rows, max_blocks))
        self._turn = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._capture_all()

    def _capture_all(self) -> None:
        pool: tuple[int, int] | None = None
        for size in reversed(self.sizes):
            inputs = self._inputs[size]
            inputs.zero_()
            inputs[KV_SLOT].fill_(-1)
            inputs[SLOT].fill_(self._spare_slot)
            self._run(size)  # compiles what is not compiled yet, outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits, tokens = self._run(size)
            pool = graph.pool()
            self._graphs[size] = (graph, logits, tokens)

    def _run(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self._inputs[size]
        on_device = self._newest[inputs[SLOT]]
        token_ids = torch.where(inputs[FROM_DEVICE] > 0, on_device, inputs[TOKEN])
        attention = Attention(
            positions=inputs[POSITION],
            slot_mapping=inputs[KV_SLOT],
            block_tables=self._tables[:size],
            query_start=self._query_start[: size + 1],
            seq_lens=inputs[LENGTH].int(),
            num_decodes=size,
            max_query_len=1,
            workspace=self._workspace,
        )
        logits = self._forward(token_ids, attention)
        tokens = self._greedy(logits)
        self._newest[inputs[SLOT]] = tokens.clamp(min=0)
        return logits, tokens

    def takes(self, arrays: StepArrays) -> bool:
        """Whether the step is of decodes only, and not too many."""
        return arrays.num_decodes == len(arrays.slots) <= self.sizes[-1]

    def replay(self, arrays: StepArrays) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue the step: its (logits, greedy tokens), which the next replay overwrites."""
        n = len(arrays.slots)
        size = next(size for size in self.sizes if size >= n)
        staging = self._stagings[self._turn]
        self._turn ^= 1
        staging.read.synchronize()
        self._pack(arrays, staging, n, size)
        self._inputs[size].copy_(staging.packed[: INPUTS * size].view(INPUTS, size), non_blocking=True)
        used = arrays.block_tables.shape[1]
        tables = staging.tables[: n * used].to(self._tables.device, non_blocking=True)
        self._tables[:n, :used] = tables.view(n, used)
        staging.read.record()
        graph, logits, tokens = self._graphs[size]
        graph.replay()
        return logits[:n], tokens[:n]

    def _pack(self, arrays: StepArrays, staging: _Staging, n: int, size: int) -> None:
        packed = staging.packed[: INPUTS * size].view(INPUTS, size).numpy()
        packed[TOKEN, :n] = arrays.token_ids
        packed[FROM_DEVICE] = 0
        packed[FROM_DEVICE, arrays.from_device] = 1
        packed[POSITION, :n] = arrays.positions
        packed[KV_SLOT, :n] = arrays.slot_mapping
        packed[LENGTH, :n] = arrays.seq_lens
        packed[SLOT, :n] = arrays.slots
        packed[TOKEN, n:] = packed[POSITION, n:] = packed[LENGTH, n:] = 0
        packed[KV_SLOT, n:] = -1
        packed[SLOT, n:] = self._spare_slot
        flat: np.ndarray = staging.tables.numpy()
        flat[: arrays.block_tables.size] = arrays.block_tables.ravel()
