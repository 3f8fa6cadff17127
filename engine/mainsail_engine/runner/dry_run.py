"""A runner's steps on tensors without memory: which kernels it would launch, each in which variant.

The model is the real one, in the shapes of one rank's share and with as many layers as it has kinds of them, but its
tensors are on "meta": they have a shape, a type and an address, and nothing behind it. Every shape of step goes through
it once: those that CUDA graphs hold, the large ones that run as they are, and what sampling settings add. The launches
are noted (mainsail_kernels/ahead.py), and nobody computes anything.

What cannot be run so is left out, and compiled when it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mainsail_engine.config import BLOCK_SIZE, EngineConfig
from mainsail_engine.errors import UnsupportedModelError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.loader import Weights
from mainsail_engine.model.lora import AdapterSlots
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.quantization import read_quantization
from mainsail_engine.model.registry import DECODERS
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.cuda_graphs import LARGEST_MIXED, PaddedSteps, step_rows
from mainsail_engine.runner.model_runner import (
    batched_tokens,
    choose_dtype,
    choose_kv_dtype,
    decode_rows,
    guess_rows,
    model_len,
    multiplies_fp8,
)
from mainsail_engine.runner.token_masks import TokenMasks
from mainsail_engine.runner.uploads import Uploads
from mainsail_engine.sampling.sampler import Sampler, greedy
from mainsail_kernels._triton import Card
from mainsail_kernels.ahead import Launch, noted
from mainsail_kernels.attention_decode import decode_workspace
from mainsail_kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from mainsail_kernels.kv_transpose import room_shape
from mainsail_kernels.tokens import note, send, unpack

log = logging.getLogger(__name__)
DEVICE = torch.device("meta")
NUM_BLOCKS = 64
"""Of the KV pool: no kernel is told how many there are."""
LARGE_STEPS = (2048, 4096, 8192, 16384)
"""Tokens of steps that are launched as they are, up to the budget; whether 16 divides their number matters."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.0, "logit_bias": ((5, 1.0),)},
)


class Shapes(Weights):
    """Parameters of the right shapes, with nothing in them."""

    @property
    def is_dummy(self) -> bool:
        return False

    def _fill(self, out: torch.Tensor, part: Any) -> None:
        del out, part


def launches_of(config: EngineConfig, card: Card) -> list[Launch]:
    """For this card, each variant once. Raises UnsupportedModelError for a model of which that cannot be told."""
    architecture = read_architecture(Path(config.model.path))
    if architecture.name not in DECODERS or config.pipeline_parallel_size > 1:
        raise UnsupportedModelError(f"the steps of {architecture.name} in this configuration are not known beforehand")
    with noted(card) as launches, torch.inference_mode():
        dry_run = _DryRun(config, architecture)
        for part in (
            dry_run.padded_steps,
            dry_run.large_steps,
            dry_run.sampling,
            dry_run.to_and_fro,
            dry_run.block_moves,
        ):
            try:
                part()
            except Exception as error:
                log.warning("%s: not all of it is compiled ahead (%s)", part.__name__, error)
    return launches


class _DryRun:
    def __init__(self, config: EngineConfig, whole: Architecture) -> None:
        path = Path(config.model.path)
        self.architecture = a = replace(whole, num_layers=layers_to_run(whole))
        self.config, self.slots = config, config.scheduler.max_num_seqs
        quantization = read_quantization(path, config.model.quantization)
        self.dtype = choose_dtype(config.model.dtype, whole, DEVICE)
        kv_dtype = choose_kv_dtype(config.cache.dtype, quantization, self.dtype)
        self.step_rows = step_rows(whole, fp8=multiplies_fp8(quantization))
        self.max_model_len = model_len(config.model.max_model_len, whole)
        self.budget = batched_tokens(config, DEVICE)
        self.rows = decode_rows(config, whole)
        parallel = Parallel(0, config.tensor_parallel_size)
        self.model: LlamaForCausalLM = DECODERS[a.name](
            a, Shapes(None, DEVICE, self.dtype, quantization), max_positions=self.max_model_len, device=DEVICE,
            parallel=parallel,
        )  # fmt: skip
        self._adapter_slots = config.lora.max_loras if config.lora else 0
        if config.lora is not None:
            slots, rank = config.lora.max_loras, config.lora.max_lora_rank
            self.model.take_adapters(
                AdapterSlots(a, parallel, num_slots=slots, rank=rank, device=DEVICE, dtype=self.dtype)
            )
        heads, kv_heads = self.model.num_heads, self.model.num_kv_heads
        shape = (a.num_layers, NUM_BLOCKS, 2, kv_heads, BLOCK_SIZE, a.head_dim)
        self.kv_cache = torch.empty(shape, dtype=kv_dtype, device=DEVICE)
        self.workspace = decode_workspace(self.rows, heads, kv_heads, a.head_dim, DEVICE)
        room = room_shape(self.kv_cache[0], self.slots, self._max_blocks, heads, self.dtype)
        self.room = None
        if room is not None and self.model.reads_transposed_values:
            self.room = torch.empty(room, dtype=kv_dtype, device=DEVICE)
        self.newest = torch.zeros(self.slots + 1, dtype=torch.int64, device=DEVICE)

    def padded_steps(self) -> None:
        PaddedSteps(
            self._forward, self.model.logits, greedy, self.newest, Uploads(torch.device("cpu")),
            workspace=self.workspace, room=self.room, max_num_seqs=self.rows, max_blocks=self._max_blocks,
            capture=False, guess_rows=guess_rows(self.config, self.architecture), adapter_slots=self._adapter_slots,
            mixed_rows=self.step_rows,
        ).run_all()  # fmt: skip

    def large_steps(self) -> None:
        """A prompt of so many tokens, and one token less; the budget's own is what a start measures memory by."""
        longest = min(self.budget, self.max_model_len)
        for size in sorted({longest, *(n for n in LARGE_STEPS if LARGEST_MIXED < n < longest)}):
            for tokens in (size, size - 1):
                self._large_step(tokens)
        self._step(1, num_decodes=1)

    def _large_step(self, tokens: int) -> None:
        self._step(tokens, num_decodes=0)
        if self.room is not None:
            self._step(tokens, num_decodes=0, room=self.room)

    def _step(self, tokens: int, *, num_decodes: int, room: torch.Tensor | None = None) -> None:
        """One sequence, as ModelRunner launches it when it fits into no padded shape."""

        def ints(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=DEVICE)

        blocks = -(-tokens // BLOCK_SIZE)
        attention = Attention(
            positions=ints(tokens), slot_mapping=ints(tokens), block_tables=ints(1, blocks, dtype=torch.int32),
            chunk_start=ints(2 - num_decodes, dtype=torch.int32), seq_lens=ints(1, dtype=torch.int32),
            num_decodes=num_decodes, max_query_len=tokens, workspace=self.workspace, room=room,
            wanted=ints(1),
        )  # fmt: skip
        greedy(self.model.logits(self._forward(ints(tokens), attention)))

    def sampling(self) -> None:
        eos = self.architecture.eos_token_ids
        sampler = Sampler(self.slots, self.architecture.vocab_size, eos, DEVICE, _send)
        for count in (1, min(16, self.slots), min(17, self.slots)):
            slots = np.arange(count)
            for settings in SETTINGS:
                for slot in range(count):
                    params = SamplingParams(max_tokens=1, **settings)
                    sampler.move_in(slot, Request("dry-run", [0], params, arrival_time_s=0.0))
                sampled = sampler.sample(self._logits(count), slots, np.ones(count, np.int64))
                note(self.newest, _send([slots])[0], sampled.tokens)
            words = -(-self.architecture.vocab_size // 32)
            masks = TokenMasks(
                torch.empty((count, words), dtype=torch.int32, device=DEVICE),
                torch.empty(count, dtype=torch.int64, device=DEVICE),
            )
            sampler.sample(self._logits(count), slots, np.ones(count, np.int64), masks)

    def to_and_fro(self) -> None:
        """A step's inputs, and its tokens."""
        numbers = torch.empty(64, dtype=torch.int32, device=DEVICE)
        tables = torch.empty((1, self._max_blocks), dtype=torch.int32, device=DEVICE)
        unpack(numbers, numbers[:63], tables, width=1, decodes=1, gap=0)
        send(self.newest, self.newest)

    def block_moves(self) -> None:
        blocks = torch.empty(1, dtype=torch.int64, device=DEVICE)
        layers, _, *rest = self.kv_cache.shape
        staging = torch.empty((2, layers, *rest), dtype=self.kv_cache.dtype, device=DEVICE)
        gather_blocks(self.kv_cache, blocks, staging[:1])
        scatter_blocks(self.kv_cache, blocks, staging[:1])
        copy_blocks(self.kv_cache, blocks, blocks, blocks)

    @property
    def _max_blocks(self) -> int:
        return -(-self.max_model_len // BLOCK_SIZE)

    def _forward(self, inputs: torch.Tensor, attention: Attention) -> torch.Tensor:
        return self.model.forward(inputs, attention, self.kv_cache)

    def _logits(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self.architecture.vocab_size), dtype=self.dtype, device=DEVICE)


def layers_to_run(a: Architecture) -> int:
    """So many that every kind of layer is among them, and after it another (the last one computes fewer rows)."""
    dense = a.experts.dense_layers if a.experts is not None else frozenset[int]()
    kinds = [(a.window(layer), layer in a.no_rope_layers, layer in dense) for layer in range(a.num_layers)]
    return min(a.num_layers, max(kinds.index(kind) for kind in kinds) + 3)


def _send(arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(DEVICE) for array in arrays]  # pyright: ignore[reportUnknownMemberType]
