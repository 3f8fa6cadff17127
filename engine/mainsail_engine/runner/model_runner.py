"""The forward pass: loads the model, owns the KV cache, turns a step's plan into tokens.

Launching and reading are apart: `launch` queues a step on the device and returns; `result` waits for its tokens. The
newest token of every slot stays on the device (`_newest`), so that a step can be launched before the last one's tokens
are read. On the CPU a launch computes at once, and the same code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mainsail_engine.chunking import STEP_ROWS
from mainsail_engine.config import BLOCK_SIZE, EngineConfig, LoraConfig
from mainsail_engine.errors import InvalidAdapterError, InvalidConfigurationError, OutOfMemoryError
from mainsail_engine.kv.moves import BlockCopy
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.attention_cpu import CpuAttention
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.lora import Adapter, AdapterRows, AdapterSlots, read_adapter
from mainsail_engine.model.parallel import SINGLE, Parallel
from mainsail_engine.model.quantization import Fp8, Quantization, read_quantization
from mainsail_engine.model.registry import load_model
from mainsail_engine.pages import untouched_zeros
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner import device_memory, memory
from mainsail_engine.runner.batch import BlockTables, StepArrays, build
from mainsail_engine.runner.cuda_graphs import (
    LARGEST_STEP,
    PaddedSteps,
    ShapeOptions,
    graph_bytes,
    shapes_of,
    step_rows,
)
from mainsail_engine.runner.device_memory import DeviceMemory
from mainsail_engine.runner.sleep import move_tensors, to_device, to_host
from mainsail_engine.runner.swap import HostMemory
from mainsail_engine.runner.threads import multiplies_bfloat16, set_cpu_threads
from mainsail_engine.runner.token_masks import MaskStaging, TokenMasks
from mainsail_engine.runner.uploads import Downloads, Uploads
from mainsail_engine.sampling.extras import PendingExtras
from mainsail_engine.sampling.logprobs import prompt_logprob_rows
from mainsail_engine.sampling.pooling import Pooler
from mainsail_engine.sampling.sampler import PROMPT, Sampler, greedy
from mainsail_engine.step import Chunk, StepPlan, StepResult
from mainsail_engine.timeline import Mark, unmarked
from mainsail_kernels.attention_decode import decode_workspace
from mainsail_kernels.blocks import copy_blocks
from mainsail_kernels.kv_transpose import room_shape
from mainsail_kernels.tokens import note, resolve

CUDA_BATCHED_TOKENS = 8192
CPU_BATCHED_TOKENS = 512
SPREAD_HEADS = {"cuda": 128, "cpu": 0}
"""Guesses of fewer KV heads than this, over the requests that guess, are verified as decodes. On CUDA a chunk has one
program for each, which reads its whole context: too few to fill the card, where decodes split theirs. On the CPU what
counts is that a chunk reads its context once."""
SPREAD_ROWS = 256


@dataclass(slots=True)
class PendingTokens:
    """A launched step: its tokens, on the way to the CPU."""

    tokens: torch.Tensor
    done: torch.cuda.Event | None
    extras: PendingExtras | None = None

    def result(self) -> StepResult:
        unseen = self.done is not None and self.done.query()
        if self.done is not None:
            self.done.synchronize()
        tokens: list[int] = self.tokens.numpy().tolist()
        extras = {} if self.extras is None else self.extras.read()
        return StepResult(tokens, extras, ended_unseen=unseen)


class PendingConstrained:
    """step.PendingLogits: a launched step whose sampling waits for the masks of its constrained rows."""

    def __init__(self, staging: MaskStaging, queue: Callable[[TokenMasks | None], PendingTokens]) -> None:
        self._staging, self._queue = staging, queue
        self._tokens: PendingTokens | None = None

    @torch.inference_mode()
    def sample(self, rows: Sequence[int], fill: Callable[[np.ndarray], None]) -> None:
        masks = None
        if rows:
            fill(self._staging.take(len(rows)))
            masks = self._staging.upload(rows)
        self._tokens = self._queue(masks)

    def result(self) -> StepResult:
        if self._tokens is None:
            raise RuntimeError("a constrained step must be sampled before its result is read")
        return self._tokens.result()


def choose_device(name: str, rank: int = 0) -> torch.device:
    """The device of a rank of this node: each has a GPU of its own, from the named one on (cuda: the first)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise InvalidConfigurationError(f"--device {name}: torch sees no CUDA device; use --device cpu or auto")
    index = (device.index or 0) + rank
    if index >= (count := torch.cuda.device_count()):
        raise InvalidConfigurationError(
            f"--device {name}: this node has {count} GPUs, and none is left for its rank {rank}: "
            "--tensor-parallel-size times --pipeline-parallel-size ranks need a GPU each"
        )
    return torch.device("cuda", index)


def choose_dtype(name: str, architecture: Architecture, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's, where float32 becomes bfloat16 on CUDA, and on the CPU all becomes float32, but for
    checkpoints of 16 bits on a CPU that multiplies bfloat16."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        return named[name]
    if device.type == "cpu":
        halves = architecture.dtype != "float32" and multiplies_bfloat16()
        return torch.bfloat16 if halves else torch.float32
    return named.get(architecture.dtype, torch.bfloat16) if architecture.dtype != "float32" else torch.bfloat16


def choose_kv_dtype(name: str, quantization: Quantization, dtype: torch.dtype) -> torch.dtype:
    """auto: FP8 where the checkpoint brings scales for it, else the model's."""
    wanted = quantization.kv_scales if name == "auto" else name.startswith("fp8")
    return torch.float8_e4m3fn if wanted else dtype


def multiplies_fp8(quantization: Quantization) -> bool:
    """Whether matrices are in FP8, and so what many rows of a step are multiplied in."""
    return quantization.online == "fp8" or any(isinstance(group.form, Fp8) for group in quantization.groups)


def check_device(quantization: Quantization, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Raises InvalidConfigurationError for FP8 on a GPU without."""
    wanted = multiplies_fp8(quantization) or kv_dtype == torch.float8_e4m3fn
    if wanted and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InvalidConfigurationError(
            "FP8 weights and FP8 KV need a GPU of compute capability 8.9 or more (Ada, Hopper), which "
            f"{torch.cuda.get_device_name(device)} has not"
        )


class ModelRunner:
    """step.Runner over one device: the whole model, or one rank's share of it."""

    num_host_blocks = 0
    """Host memory is another's (runner/swap.py)."""

    def __init__(
        self, config: EngineConfig, parallel: Parallel = SINGLE, mark: Mark = unmarked,
        await_kernels: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Loads the weights and takes the KV pool. Raises StartupError's kinds.

        mark: told of each phase of the start; await_kernels: called before the first step.
        """
        path = Path(config.model.path)
        self.architecture = read_architecture(path)
        self._parallel = parallel
        rank = parallel.stage * parallel.size + parallel.rank
        self.device = choose_device(config.device, rank - config.ranks_of(config.nodes.node_rank).start)
        self.dtype = choose_dtype(config.model.dtype, self.architecture, self.device)
        quantization = read_quantization(path, config.model.quantization)
        self.kv_dtype = choose_kv_dtype(config.cache.dtype, quantization, self.dtype)
        check_device(quantization, self.kv_dtype, self.device)
        staged = parallel.num_stages > 1
        self.step_rows = STEP_ROWS if staged else step_rows(self.architecture, fp8=multiplies_fp8(quantization))
        """What mixed steps are padded to."""
        self.max_model_len = model_len(config.model.max_model_len, self.architecture)
        self.eos_token_ids = self.architecture.eos_token_ids
        self.vocab_size = self.architecture.vocab_size
        self.budget = batched_tokens(config, self.device, self._longest_prompt())
        self._guess_rows = guess_rows(config, self.architecture)
        self._decode_rows = decode_rows(config, self.architecture)
        if self.device.type == "cpu":
            set_cpu_threads(config.ranks_per_node)
        self.take_device()
        self._uploads = Uploads(self.device)
        sleeps = parallel.is_alone  # an engine of several ranks cannot
        self._memory = DeviceMemory(self.device) if sleeps and device_memory.available(self.device) else None
        self._padded: PaddedSteps | None = None
        mark("device")
        try:
            with self._memory.lasting() if self._memory else nullcontext():
                self._model = load_model(
                    self.architecture, path, dummy=config.model.load_format == "dummy", dtype=self.dtype,
                    max_positions=self.max_model_len, device=self.device, parallel=parallel, quantization=quantization,
                )  # fmt: skip
                self._adapters = self._take_adapters(config.lora)
            mark("weights")
            await_kernels()
            mark("kernels")
            self._take_pool(config)
            mark("kv_pool")
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the device has too little memory for the model and its KV pool: {error}"
            ) from error
        self._warm_up()
        self._padded = self._pad(config)
        mark("graphs")

    def take_device(self) -> None:
        """For the calling thread: another thread begins on the first GPU, which is another rank's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def samples(self) -> bool:
        """Whether tokens come of its steps: of a stage that is not the last, hidden states go to the next instead."""
        return self._parallel.is_last

    def _longest_prompt(self) -> int:
        """Where prompts are computed in one step, the tokens of the longest; else 0: any budget will do."""
        return self.max_model_len if self.architecture.bidirectional else 0

    def _take_adapters(self, config: LoraConfig | None) -> AdapterSlots | None:
        if config is None:
            return None
        if not isinstance(self._model, LlamaForCausalLM):
            raise InvalidConfigurationError(f"--enable-lora: adapters of {self.architecture.name} are not supported")
        slots = AdapterSlots(
            self.architecture, self._parallel, num_slots=config.max_loras, rank=config.max_lora_rank,
            device=self.device, dtype=self.dtype,
        )  # fmt: skip
        self._model.take_adapters(slots)
        return slots

    def read_adapter(self, name: str, path: str) -> Adapter:
        """From the disk to the CPU, checked; beside running steps. Raises InvalidAdapterError."""
        if self._adapters is None:
            raise InvalidAdapterError("this engine takes no adapters: start it with --enable-lora")
        adapter = read_adapter(Path(path), name, self.architecture)
        self._adapters.check(adapter, name)
        return adapter

    def fill_adapter(self, slot: int, adapter: Adapter) -> None:
        """Put a checked adapter into a slot that no request of a later step uses yet."""
        if self._adapters is None:
            raise RuntimeError("there are no slots for adapters")
        self._adapters.fill(slot, adapter)

    def sleep(self, host: HostMemory | None = None) -> None:
        """Weights to the host, the KV pool's memory given back. Nothing may be launched until `wake_up`.

        Graphs and scratch stay where the device's memory can be taken again at the same addresses; else they go too.
        host: the memory for KV blocks, which is empty now; weights lie in it until `wake_up`.
        """
        if self._memory:
            self._memory.release(host.lend(self._memory.num_lasting_bytes) if host is not None else ())
            return
        if host is not None:
            host.lend(0)
        self._padded = self._workspace = self._room = None
        self.kv_cache = torch.empty(0, dtype=self.kv_dtype)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            move_tensors(self._model, to_host)
            torch.cuda.empty_cache()

    def wake_up(self, config: EngineConfig) -> None:
        """The weights back, and an empty pool of the same size. Raises OutOfMemoryError; then it may be tried again."""
        if self._memory:
            self._memory.restore()
            return
        if self.device.type == "cuda":
            move_tensors(self._model, to_device(self.device))
        self._allocate(self.num_blocks, config.scheduler.max_num_seqs)
        self._warm_up()
        self._padded = self._pad(config)

    def _pad(self, config: EngineConfig) -> PaddedSteps | None:
        """None where no graph can be: on the CPU, and of models that may wait for the device in a step."""
        if self.device.type != "cuda" or not self._model.captures_graphs:
            return None
        with torch.inference_mode():
            return PaddedSteps(
                lambda inputs, attention: self._model.forward(inputs, attention, self.kv_cache),
                self._model.logits if self.samples else None,
                greedy,
                self._newest,
                self._uploads,
                workspace=self._workspace,
                room=self._room,
                max_num_seqs=self._decode_rows,
                max_blocks=self._tables.rows.shape[1],
                capture=config.cuda_graphs,
                **self._shape_options(config),
                incoming=None if self._parallel.is_first else self._room_for_hidden(LARGEST_STEP).zero_(),
            )

    def _shape_options(self, config: EngineConfig) -> ShapeOptions:
        return {
            "guess_rows": self._guess_rows,
            "adapter_slots": config.lora.max_loras if config.lora else 0,
            "mixed_rows": self.step_rows,
        }

    def _room_for_hidden(self, num_tokens: int) -> torch.Tensor:
        return torch.empty((num_tokens, self.architecture.hidden_size), dtype=self.dtype, device=self.device)

    def _take_pool(self, config: EngineConfig) -> None:
        a, slots = self.architecture, config.scheduler.max_num_seqs
        num_layers = len(self._parallel.layers(a))
        per_block = memory.block_bytes(num_layers, self._model.num_kv_heads, a.head_dim, self.kv_dtype)
        if config.cache.num_blocks is not None:
            self.num_blocks = config.cache.num_blocks
        elif a.bidirectional:  # blocks without bytes: places for the scheduler to count
            self.num_blocks = slots * -(-self.max_model_len // BLOCK_SIZE)
        elif self.device.type == "cpu":
            self.num_blocks = memory.cpu_blocks(per_block, max_num_seqs=slots, max_model_len=self.max_model_len)
        else:
            self._allocate(-(-self.budget // BLOCK_SIZE), slots)
            self._profile()
            self.num_blocks = memory.cuda_blocks(
                per_block, utilization=config.cache.memory_utilization, max_model_len=self.max_model_len,
                device=self.device, set_aside=self._set_aside(config),
            )  # fmt: skip
            del self.kv_cache, self._room
            torch.cuda.empty_cache()
        self.num_blocks = self._parallel.smallest(self.num_blocks)
        self._allocate(self.num_blocks, slots, self._memory)

    def _set_aside(self, config: EngineConfig) -> int:
        """Bytes for what the profiling pass does not show: graphs, and the logits of rows that verify guesses."""
        verified = 8 * self._guess_rows * self.vocab_size
        if not config.cuda_graphs:
            return verified
        options = self._shape_options(config)
        shapes = shapes_of(self._decode_rows, transposes=self._room is not None, **options)
        return graph_bytes(self.architecture, shapes) + verified

    def _allocate(self, num_blocks: int, slots: int, pool_memory: DeviceMemory | None = None) -> None:
        """The KV pool (in pool_memory, if there is one) and everything that has a row for each slot."""
        a = self.architecture
        heads, kv_heads = self._model.num_heads, self._model.num_kv_heads
        num_layers = 0 if a.bidirectional else len(self._parallel.layers(a))
        shape = (num_layers, num_blocks, 2, kv_heads, BLOCK_SIZE, a.head_dim)
        num_bytes = torch.Size(shape).numel() * self.kv_dtype.itemsize
        if pool_memory and num_bytes:
            self.kv_cache = pool_memory.passing(num_bytes).view(self.kv_dtype).view(shape)
        elif self.device.type == "cpu" and num_bytes:
            self.kv_cache = untouched_zeros(num_bytes).view(self.kv_dtype).view(shape)
        else:
            self.kv_cache = torch.zeros(shape, dtype=self.kv_dtype, device=self.device)
        self._tables = BlockTables(slots, -(-self.max_model_len // BLOCK_SIZE))
        self._sampler = Sampler(slots, a.vocab_size, self.eos_token_ids, self.device, self._uploads.send)
        self._pooler = Pooler()
        self._masks = MaskStaging(slots, a.vocab_size, self.device)
        cuda = self.device.type == "cuda"
        rows = self._decode_rows
        self._workspace = decode_workspace(rows, heads, kv_heads, a.head_dim, self.device) if cuda else None
        self._room = self._room_for_values(slots, pool_memory)
        self._newest = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        self._downloads = Downloads(slots + self._guess_rows, max(3, self._parallel.num_stages)) if cuda else None

    def _room_for_values(self, slots: int, pool_memory: DeviceMemory | None) -> torch.Tensor | None:
        """Where prompts' attention transposes values of a cache in FP8 (kv_transpose.room_shape); None: it does not."""
        if not len(self.kv_cache) or not self._model.reads_transposed_values:
            return None
        layer, dtype = self.kv_cache[0], self.kv_cache.dtype
        shape = room_shape(layer, slots, self._tables.rows.shape[1], self._model.num_heads, self.dtype)
        if shape is None or pool_memory is None:
            return torch.empty(shape, dtype=dtype, device=self.device) if shape else None
        return pool_memory.passing(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)

    def _profile(self) -> None:
        """One step of the whole token budget, so that its peak is counted before the pool is sized."""
        length = min(self.budget, self.max_model_len)
        request = _warm_up_request(length)
        blocks = list(range(-(-length // BLOCK_SIZE)))
        chunk = Chunk(request=request, start=0, num_tokens=length, samples=True, slot=0, block_ids=blocks)
        self.launch(StepPlan(chunks=[chunk])).result()

    def _warm_up(self) -> None:
        """Generate a token before anybody asks: kernels are compiled, caches warm. Block 0 is overwritten later."""
        request = _warm_up_request(1)
        chunk = Chunk(request=request, start=0, num_tokens=1, samples=True, slot=0, block_ids=[0])
        self.launch(StepPlan(chunks=[chunk], num_decodes=1)).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingTokens | PendingConstrained:
        """Start a step; see step.Runner."""
        if plan.copies:
            self._copy(plan.copies)
        adapters = self._adapters is not None
        arrays, moved_in = build(plan, self._tables, spread=self._spreads(plan), adapters=adapters)
        for chunk in moved_in:
            self._sampler.move_in(chunk.slot, chunk.request)
        guessed = self._sampler.verify(plan)
        whole = bool(self._sampler.slots.asks(arrays.slots) & PROMPT)
        shape = self._padded.shape_for(arrays) if self._padded and not whole else None
        if self._padded and shape:
            if self._padded.incoming is not None:
                self._parallel.receive(self._padded.incoming[: len(arrays.token_ids)])
            logits, tokens = self._padded.launch(shape, arrays)
            if not self.samples:
                return self._passed_on(logits)
            if self._sampler.wants_best(arrays.sampled_slots) and not plan.is_constrained:
                return self._pending(tokens)
            return self._sample_or_wait(logits, arrays, plan, None, guessed, tokens)
        hidden, sampled = self._forward(arrays, whole=whole)
        if not self.samples:
            return self._passed_on(hidden)
        extras = self._prompt_extras(plan, arrays, hidden) if whole else None
        if not len(arrays.sampled):
            return self._pending(torch.empty(0, dtype=torch.int64), extras)
        logits = self._model.logits(hidden[sampled] if whole else hidden)
        return self._sample_or_wait(logits, arrays, plan, extras, guessed)

    def _passed_on(self, hidden: torch.Tensor) -> PendingTokens:
        """The end of a step in a stage that is not the last."""
        self._parallel.pass_on(hidden)
        return self._pending(torch.empty(0, dtype=torch.int64, device=self.device))

    def _spreads(self, plan: StepPlan) -> bool:
        """Whether rows that verify guesses are computed as decodes (runner/batch.py)."""
        rows = plan.num_decodes + sum(
            chunk.num_tokens for chunk in plan.chunks[plan.num_decodes :][: plan.num_verifying]
        )
        heads = plan.num_verifying * self._model.num_kv_heads
        return 0 < heads < SPREAD_HEADS[self.device.type] and rows <= self._decode_rows

    def _forward(self, arrays: StepArrays, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A step as it is, kernel by kernel: (hidden states of all rows or else the sampled ones, sampled rows)."""
        token_ids, from_slots, sampled, *rest = self._uploads.send(
            [
                arrays.token_ids, arrays.from_slots_of_rows(), arrays.sampled,
                arrays.positions, arrays.slot_mapping, arrays.block_tables,
                arrays.query_start[arrays.num_decodes :], arrays.seq_lens,
            ]
        )  # fmt: skip
        if len(arrays.from_device):
            token_ids = resolve(token_ids, from_slots, self._newest)
        attention = self._attention(arrays, *rest)
        if len(arrays.adapter_slots):
            attention.adapters = AdapterRows(*self._uploads.send([arrays.adapter_rows, arrays.adapter_slots]))
        attention.wanted = None if whole or not self.samples else sampled
        first = self._parallel.is_first
        inputs = token_ids if first else self._parallel.receive(self._room_for_hidden(len(token_ids)))
        return self._model.forward(inputs, attention, self.kv_cache), sampled

    def _sample_or_wait(
        self,
        logits: torch.Tensor,
        arrays: StepArrays,
        plan: StepPlan,
        extras: PendingExtras | None,
        guessed: Mapping[int, Sequence[int]],
        best: torch.Tensor | None = None,
    ) -> PendingTokens | PendingConstrained:
        if plan.is_constrained:
            return PendingConstrained(
                self._masks, lambda masks: self._sample(logits, arrays, plan, extras, masks, guessed, best)
            )
        return self._sample(logits, arrays, plan, extras, None, guessed, best)

    def _sample(
        self,
        logits: torch.Tensor,
        arrays: StepArrays,
        plan: StepPlan,
        extras: PendingExtras | None,
        masks: TokenMasks | None,
        guessed: Mapping[int, Sequence[int]],
        best: torch.Tensor | None,
    ) -> PendingTokens:
        positions = arrays.positions[arrays.sampled] + 1
        sampled = self._sampler.sample(logits, arrays.sampled_slots, positions, masks, guessed, best)
        note(self._newest, self._up(arrays.sampled_slots), sampled.tokens)
        if sampled.logprobs is not None:
            extras = extras or PendingExtras()
            extras.add_sampled(sampled, plan)
        return self._pending(sampled.tokens, extras)

    def _prompt_extras(self, plan: StepPlan, arrays: StepArrays, hidden: torch.Tensor) -> PendingExtras:
        """What requests want of every prompt position: log-probabilities, an embedding."""
        extras = PendingExtras()
        for index, chunk in enumerate(plan.chunks):
            params, first = chunk.request.params, int(arrays.first_rows[index])
            if params.pooling is not None:
                vector = self._pooler.add(chunk.request, chunk.start, hidden[first : first + chunk.num_tokens])
                if vector is not None:
                    extras.add_embedding(index, vector)
            elif params.prompt_logprobs is not None:
                self._add_prompt_logprobs(extras, index, chunk, hidden[first : first + chunk.num_tokens])
        return extras

    def _add_prompt_logprobs(self, extras: PendingExtras, index: int, chunk: Chunk, hidden: torch.Tensor) -> None:
        """hidden [num_tokens, hidden_size] of the chunk: position p tells of the token at p + 1."""
        prompt = chunk.request.prompt_token_ids
        start = max(chunk.start, chunk.request.num_prompt_logprobs)
        stop = min(chunk.start + chunk.num_tokens, len(prompt) - 1)
        if start >= stop:
            return
        num_best = chunk.request.params.prompt_logprobs or 0
        following = self._up(np.array(prompt[start + 1 : stop + 1], np.int64))
        rows = hidden[start - chunk.start : stop - chunk.start]
        extras.add_prompt(index, prompt_logprob_rows(rows, self._model.logits, following, num_best), num_best)

    def _attention(
        self,
        arrays: StepArrays,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        chunk_start: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> Attention:
        kind = CpuAttention if self.device.type == "cpu" else Attention
        return kind(
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            chunk_start=chunk_start,
            seq_lens=seq_lens,
            num_decodes=arrays.num_decodes,
            max_query_len=arrays.max_query_len,
            workspace=self._workspace,
            room=self._room if self._room is not None and arrays.transposes_values() else None,
        )

    def _up(self, values: np.ndarray) -> torch.Tensor:
        return self._uploads.send([values])[0]

    def _pending(self, tokens: torch.Tensor, extras: PendingExtras | None = None) -> PendingTokens:
        if self._downloads is None:
            return PendingTokens(tokens, None, extras)
        return PendingTokens(*self._downloads.receive(tokens), extras)

    def _copy(self, copies: list[BlockCopy]) -> None:
        columns = np.array([(copy.src, copy.dst, copy.num_tokens) for copy in copies], np.int64).T
        src, dst, num_tokens = self._uploads.send([np.ascontiguousarray(column) for column in columns])
        copy_blocks(self.kv_cache, src, dst, num_tokens)


def _warm_up_request(length: int) -> Request:
    return Request("warm-up", [0] * length, SamplingParams(max_tokens=1, temperature=0.0), arrival_time_s=0.0)


def batched_tokens(config: EngineConfig, device: torch.device, least: int = 0) -> int:
    """The token budget of a step. least: of a model whose prompts are computed in one step, the longest prompt.

    Raises InvalidConfigurationError for less than that.
    """
    default = max(CPU_BATCHED_TOKENS if device.type == "cpu" else CUDA_BATCHED_TOKENS, least)
    budget = config.scheduler.max_num_batched_tokens or default
    if budget < least:
        raise InvalidConfigurationError(
            f"--max-num-batched-tokens {budget}: an encoder computes a prompt in one step: set it to {least} or more, "
            "or --max-model-len to less"
        )
    return budget


def guess_rows(config: EngineConfig, architecture: Architecture) -> int:
    """Rows of a step that may verify guesses."""
    return 0 if config.speculative is None or architecture.bidirectional else config.speculative.max_step_rows


def decode_rows(config: EngineConfig, architecture: Architecture) -> int:
    """Rows that a step's decodes may have; with guesses, each of them may be one."""
    return max(config.scheduler.max_num_seqs, min(SPREAD_ROWS, guess_rows(config, architecture)))


def model_len(asked: int | None, architecture: Architecture) -> int:
    longest = architecture.max_position_embeddings
    if asked is not None and asked > longest:
        raise InvalidConfigurationError(f"--max-model-len {asked} is over the model's own limit of {longest} tokens")
    return asked or longest
