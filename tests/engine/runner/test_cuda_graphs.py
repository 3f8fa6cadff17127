"""CUDA graphs: which sizes there are; and on a card, that replaying changes no token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.speculation import Replay, always
from tests.engine.test_sampling_equivalences import mixed, run
from tests.engine.tiny import make_tiny_model

from mainsail_engine.chunking import STEP_ROWS
from mainsail_engine.config import (
    MAX_SPECULATIVE_TOKENS,
    CacheConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner import model_runner
from mainsail_engine.runner.batch import TRANSPOSE_ROWS, BlockTables, StepArrays, build
from mainsail_engine.runner.cuda_graphs import (
    Layout,
    PaddedSteps,
    StepShape,
    _Place,
    decode_sizes,
    graph_bytes,
    pack,
    shapes_of,
    step_rows,
)
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.sampling.sampler import greedy
from mainsail_engine.step import Chunk, StepPlan

TINY = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 500,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip
MODELS = Path(__file__).parents[3] / "benchmarks" / "models"
NUM_BLOCKS = 631
"""A prime, so that sevenths of it are a permutation."""


@pytest.mark.parametrize("largest", [1, 3, 32, 33, 100, 256, 700, 1024])
def test_every_batch_up_to_the_largest_has_a_size(largest: int) -> None:
    sizes = decode_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    assert all(min(s for s in sizes if s >= n) - n < max(n / 4, 8) for n in range(1, largest + 1))


def test_beyond_1024_rows_steps_run_without_a_graph() -> None:
    assert decode_sizes(4000)[-1] == 1024


@pytest.mark.parametrize("max_num_seqs", [1, 24, 256, 2000])
def test_shapes_have_room_for_every_row(max_num_seqs: int) -> None:
    shapes = shapes_of(max_num_seqs)
    for shape in shapes:
        assert shape.decodes <= shape.sampled <= shape.tokens
        assert shape.sampled >= min(shape.decodes + shape.chunks, shape.tokens, max_num_seqs)
        assert shape.is_mixed or shape.tokens == shape.decodes == shape.sampled
    for tokens in STEP_ROWS:
        last = [shape for shape in shapes if shape.is_mixed and shape.tokens == tokens][-1]
        assert last.sampled == last.decodes == min(tokens, max_num_seqs)


@pytest.mark.parametrize(("decodes", "prompts", "room"), [(64, 4, 64), (65, 4, 256), (3, 15, 64), (3, 17, 256)])
def test_a_step_of_few_decodes_has_room_for_few(decodes: int, prompts: int, room: int) -> None:
    """Prompts of 48 tokens."""
    steps = PaddedSteps.__new__(PaddedSteps)
    steps._shapes, steps._room = shapes_of(256), None
    arrays = step_arrays(decodes, [48] * prompts)
    shape = steps.shape_for(arrays)
    assert shape is not None
    assert shape.decodes == room
    assert shape.tokens == min(n for n in STEP_ROWS if n >= decodes + 48 * prompts)
    assert shape.sampled >= len(arrays.sampled)


def arrays_of(decodes: int, chunks: list[tuple[int, int]]) -> StepArrays:
    """Only what a shape is chosen by: chunks of (tokens, context before them)."""
    lengths = [1] * decodes + [tokens for tokens, _ in chunks]
    seqs = len(lengths)
    return replace(
        step_arrays(0, [1]),
        token_ids=np.zeros(sum(lengths), np.int64),
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        seq_lens=np.array([6] * decodes + [tokens + before for tokens, before in chunks], np.int32),
        slots=np.arange(seqs),
        sampled=np.arange(seqs),
        num_decodes=decodes,
        max_query_len=max(lengths),
    )


@pytest.mark.parametrize(
    ("decodes", "chunks", "transposes", "tokens"),
    [
        (25, [(512, 16_000)] * 2, True, 1152),
        (0, [(512, 3_800)], True, 512),
        (14, [(370, 16_000)], True, 384),
        (0, [(255, 16_000)], False, 256),
        (64, [(448, 0)], False, 512),
        (0, [(300, 1_748)] + [(75, 8_162)] * 4, False, 640),  # most of it in short chunks
        (0, [(127, 30_000)] * 10, False, 1280),
        (0, [(127, 30_000)] * 3, False, 384),
        (300, [(127, 30_000)] * 2, True, 640),  # few short ones
        (300, [(1024, 4_000)], True, 1408),
        (0, [(1024, 0)] * 8, True, None),
    ],
)
def test_steps_of_much_attention_in_long_chunks_have_shapes_that_transpose(decodes, chunks, transposes, tokens) -> None:
    arrays = arrays_of(decodes, chunks)
    assert arrays.transposes_values() == transposes
    steps = PaddedSteps.__new__(PaddedSteps)
    for room in (torch.empty(1), None):
        steps._shapes, steps._room = shapes_of(512, transposes=room is not None), room
        shape = steps.shape_for(arrays)
        assert (shape and shape.tokens) == tokens
        assert shape is None or shape.transposes == (transposes and room is not None)


def test_shapes_that_transpose_are_the_large_mixed_ones_again() -> None:
    plain, both = (shapes_of(256, guess_rows=64, adapter_slots=3, transposes=also) for also in (False, True))
    assert [shape for shape in both if not shape.transposes] == plain
    large = [shape for shape in plain if shape.is_mixed and not shape.longest and shape.tokens >= TRANSPOSE_ROWS]
    assert [replace(shape, transposes=False) for shape in both if shape.transposes] == large


@pytest.mark.parametrize(
    ("more", "rows"),
    [({}, 256), ({"guess_rows": 1024}, 1024), ({"adapter_slots": 4}, 256), ({"transposes": True}, 256)],
)
def test_memory_is_set_aside_for_the_most_logits_that_a_graph_has(more: dict[str, Any], rows: int) -> None:
    """All graphs' lie in the same memory, however many there are."""
    architecture = read_architecture(MODELS / "llama-3-8b")
    shapes = shapes_of(256, **more)
    assert max(shape.sampled for shape in shapes) == rows
    logits = 2 * rows * architecture.vocab_size
    assert 2 * logits < graph_bytes(architecture, shapes) < 4 * logits + (1 << 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_place_is_told_as_other_libraries_tell_it(dtype: torch.dtype) -> None:
    """Columns of a wider matrix, as ranks' parts are put together."""
    tensor = torch.arange(60).view(5, 12).to(dtype)[:, :7]
    told = SimpleNamespace(__array_interface__=_Place(tensor).__cuda_array_interface__)
    same = torch.from_numpy(np.asarray(told)).view(dtype)
    assert torch.equal(same, tensor)
    assert same.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("rows", [20, 256, 1024])
@pytest.mark.parametrize("max_num_seqs", [1, 24, 256])
def test_shapes_that_verify_sample_every_row(max_num_seqs: int, rows: int) -> None:
    shapes = shapes_of(max_num_seqs, guess_rows=rows)
    verify = [shape for shape in shapes if shape.longest]
    assert [shape for shape in shapes if not shape.longest] == shapes_of(max_num_seqs)
    assert all(shape.sampled == shape.tokens for shape in verify)
    anything = [shape for shape in verify if shape.longest == 1 + MAX_SPECULATIVE_TOKENS]
    assert all(shape.decodes == shape.chunks for shape in anything)
    assert max(shape.tokens for shape in anything) == rows


@pytest.mark.parametrize(("singles", "guesses", "decodes"), [(0, 4, 0), (0, 7, 0), (0, 8, 32), (1, 4, 32)])
def test_a_step_in_which_all_verify_a_few_guesses_looks_for_no_decode(singles: int, guesses: int, decodes: int) -> None:
    steps = PaddedSteps.__new__(PaddedSteps)
    steps._shapes, steps._room = shapes_of(32, guess_rows=1024), None
    arrays, _ = build(verifying_plan(singles, 20, slots=0, guesses=guesses), BlockTables(32, 4))
    shape = steps.shape_for(arrays)
    assert shape is not None
    assert (shape.decodes, shape.longest > 8) == (decodes, decodes > 0)


@pytest.mark.parametrize("rows", [0, 256])
def test_with_adapters_there_is_each_shape_again_with_room_for_their_rows(rows: int) -> None:
    plain = shapes_of(24, guess_rows=rows)
    both = shapes_of(24, guess_rows=rows, adapter_slots=5)
    assert both[: len(plain)] == plain
    assert [replace(shape, tiles=0) for shape in both[len(plain) :]] == plain
    assert all(shape.tiles >= max(min(shape.tokens, 5), shape.tokens // 16) for shape in both[len(plain) :])


def fill_slots(runner: ModelRunner) -> None:
    """Every slot holds an adapter of random numbers."""
    assert runner._adapters is not None
    torch.manual_seed(3)
    for sites in runner._adapters.layers:
        for site in sites.values():
            for factors in (site.down, site.up):
                factors.copy_(torch.randn(factors.shape) * 0.2)


def verifying_plan(singles: int, verifying: int, slots: int, guesses: int = 5) -> StepPlan:
    """Decodes with their tokens known, some of which verify guesses, through no adapter or one of the slots."""
    plan = StepPlan(num_decodes=singles, num_verifying=verifying)
    for i in range(singles + verifying):
        prompt = [(7 * i + 3 * place) % 90 + 1 for place in range(20 + i)]
        request = Request(str(i), prompt, SamplingParams(max_tokens=40, temperature=0.0), 0.0, slot=i)
        request.block_ids = [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]
        request.adapter_slot = i % (slots + 1) - 1
        made = list(range(11, 11 + guesses)) if i >= singles else []
        plan.chunks.append(Chunk(request, 19 + i, 1 + len(made), True, i, request.block_ids, made))
    return plan


@torch.inference_mode()
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize(("singles", "verifying"), [(0, 1), (3, 2), (2, 9), (0, 12)])
def test_a_padded_step_of_guesses_is_as_it_is(tmp_path: Path, singles: int, verifying: int, slots: int) -> None:
    """The arithmetic of the shape that CUDA captures, on the CPU: the same logits for every row."""
    config = EngineConfig(
        model=ModelConfig(path=str(make_tiny_model(tmp_path / "tiny"))), cache=CacheConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_seqs=12), speculative=SpeculativeConfig(method="ngram"), device="cpu",
        lora=LoraConfig(max_loras=slots) if slots else None,
    )  # fmt: skip
    runner, plan = ModelRunner(config), verifying_plan(singles, verifying, slots)
    if slots:
        fill_slots(runner)
    for chunk in plan.chunks:  # the prompts, but for their last token
        runner.launch(StepPlan(chunks=[replace(chunk, start=0, num_tokens=chunk.start, samples=False, guesses=())]))
    arrays, _ = build(plan, runner._tables, adapters=slots > 0)
    before = runner.kv_cache.clone()
    hidden, sampled = runner._forward(arrays, whole=True)
    expected = runner._model.logits(hidden[sampled])
    runner.kv_cache.copy_(before)
    wanted, _ = runner._forward(arrays, whole=False)
    assert torch.allclose(wanted, hidden[sampled], rtol=1e-4, atol=1e-5)
    runner.kv_cache.copy_(before)
    steps = PaddedSteps(
        lambda token_ids, attention: runner._model.forward(token_ids, attention, runner.kv_cache), runner._model.logits,
        greedy, runner._newest, runner._uploads, workspace=None, max_num_seqs=12, max_blocks=4, capture=False,
        guess_rows=256, adapter_slots=slots,
    )  # fmt: skip
    shape = steps.shape_for(arrays)
    assert shape is not None
    assert shape.longest
    assert (shape.tiles > 0) == bool(len(arrays.adapter_slots)) == (slots > 0 and singles + verifying > 1)
    layout, decodes = steps._layouts[shape], arrays.num_decodes
    packed = steps._packed.numpy()
    pack(packed[: layout.tables + arrays.block_tables.size], layout, shape, arrays, spare_slot=12)
    used = arrays.block_tables.shape[1]
    tables = torch.from_numpy(arrays.block_tables)
    steps._tables[:decodes, :used] = tables[:decodes]
    steps._tables[shape.decodes : shape.decodes + len(tables) - decodes, :used] = tables[decodes:]
    logits, tokens = steps._run(shape)
    rows = len(arrays.sampled)
    assert rows == singles + 6 * verifying
    torch.testing.assert_close(logits[:rows], expected, atol=1e-4, rtol=1e-4)
    assert tokens[:rows].tolist() == expected.argmax(-1).tolist()


def step_arrays(decodes: int, chunks: list[int]) -> StepArrays:
    """Decodes at position 5, chunks at positions 0 on; every second chunk samples; one decode's token is away."""
    lengths = [1] * decodes + chunks
    requests = [Request(str(i), [9] * (6 if i < decodes else 64), SamplingParams(max_tokens=9), 0.0) for i in range(99)]
    if decodes > 1:
        requests[1].prompt_token_ids.pop()
    plan = StepPlan(num_decodes=decodes)
    for i, length in enumerate(lengths):
        start, samples = (5, True) if i < decodes else (0, (i - decodes) % 2 == 0)
        plan.chunks.append(Chunk(requests[i], start, length, samples, i, [10 * i, 10 * i + 1, 10 * i + 2]))
    return build(plan, BlockTables(100, 4))[0]


@pytest.mark.parametrize(("decodes", "chunks"), [(3, []), (0, [5]), (5, [20, 3, 17])])
def test_a_packed_step_holds_its_rows_and_padding_that_does_nothing(decodes: int, chunks: list[int]) -> None:
    arrays, spare = step_arrays(decodes, chunks), 99
    shape = StepShape(64, 32, 8, 40) if chunks else StepShape(8, 8, 0, 8)
    layout = Layout.of(shape)
    packed = np.full(layout.tables + arrays.block_tables.size, 12345, np.int32)
    pack(packed, layout, shape, arrays, spare)
    n, seqs = len(arrays.token_ids), len(arrays.slots)
    assert packed[layout.token][:n].tolist() == arrays.token_ids.tolist()
    assert packed[layout.from_slot][:n].tolist() == arrays.from_slots_of_rows().tolist()
    assert packed[layout.from_slot].max() == (1 if decodes > 1 else -1)
    assert packed[layout.kv_slot][:n].tolist() == arrays.slot_mapping.tolist()
    lengths = packed[layout.lengths]
    assert lengths[:decodes].tolist() == [6] * decodes
    assert lengths[shape.decodes : shape.decodes + len(chunks)].tolist() == chunks
    assert np.count_nonzero(lengths) == seqs
    starts = packed[layout.starts].tolist()
    assert starts[: len(chunks) + 1] == [decodes + sum(chunks[:i]) for i in range(len(chunks) + 1)]
    assert set(starts[len(chunks) :]) == {n}
    sampled = len(arrays.sampled)
    assert packed[layout.sampled][:sampled].tolist() == arrays.sampled.tolist()
    assert packed[layout.sampled_slots][:sampled].tolist() == arrays.sampled_slots.tolist()
    assert set(packed[layout.kv_slot][n:]) <= {-1}
    assert set(packed[layout.from_slot][n:]) <= {-1}
    assert set(packed[layout.sampled_slots][sampled:]) <= {spare}
    assert packed[layout.tables :].tolist() == arrays.block_tables.ravel().tolist()
    assert 12345 not in packed[layout.sampled].tolist()


def runner_config(path: Path, graphs: bool, num_blocks: int, *, guesses: bool = False, slots: int = 0) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(path), load_format="dummy", dtype="float32"),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=128),  # more than the shapes for few decodes have room for
        speculative=SpeculativeConfig(method="ngram") if guesses else None,
        lora=LoraConfig(max_loras=slots, max_lora_rank=8) if slots else None,
        device="cuda",
        cuda_graphs=graphs,
    )


def make_runner(
    path: Path, graphs: bool, num_blocks: int = NUM_BLOCKS, *, guesses: bool = False, slots: int = 0
) -> ModelRunner:
    (path / "config.json").write_text(json.dumps(TINY))
    runner = ModelRunner(runner_config(path, graphs, num_blocks, guesses=guesses, slots=slots))
    if slots:
        fill_slots(runner)
    return runner


def blocks_of(index: int) -> list[int]:
    """29 blocks of the pool in a shuffled order, no two requests' the same."""
    return [(index * 29 + block) * 7 % NUM_BLOCKS for block in range(29)]


def test_no_two_requests_share_a_block() -> None:
    """Two writers of one block would race, and the comparison of tokens below would tell of nothing else."""
    blocks = [block for index in range(21) for block in blocks_of(index)]
    assert len(set(blocks)) == len(blocks)


def tokens_of(runner: ModelRunner, *, overlap: bool, slots: int = 0) -> list[list[int]]:
    """Twenty mixed requests: prefilled together, then 20 decode steps, each read at once or one step late.

    slots: of adapters that some of them go through.
    """
    runner.kv_cache.fill_(float("nan"))
    requests = []
    for i in range(20):
        prompt = torch.randint(0, 500, (3 + 9 * i,), generator=torch.Generator().manual_seed(i)).tolist()
        seeded = SamplingParams(max_tokens=99, temperature=0.8, top_p=0.9, seed=i)
        params = seeded if i % 5 == 4 else SamplingParams(max_tokens=99, temperature=0.0)
        adapter = i % (slots + 1) - 1
        requests.append(Request(str(i), prompt, params, 0.0, slot=i, block_ids=blocks_of(i), adapter_slot=adapter))
    plans = [StepPlan(chunks=[Chunk(r, 0, r.num_tokens, True, r.slot, r.block_ids) for r in requests])]
    more = Request("more", [7] * 400, SamplingParams(max_tokens=9, temperature=0.0), 0.0, slot=20)
    more.block_ids = blocks_of(20)
    for n in range(20):
        chunks = [Chunk(r, len(r.prompt_token_ids) + n, 1, True, r.slot, r.block_ids) for r in requests]
        late = [Chunk(more, 50 * (n - 5), 50, False, 20, more.block_ids)] if 5 <= n < 12 else []
        plans.append(StepPlan(chunks=chunks + late, num_decodes=len(chunks)))
    columns: list[list[int]] = []
    pending = []
    for plan in plans:
        pending.append(runner.launch(plan))
        if not overlap or len(pending) > 2:
            columns.append(pending.pop(0).result().token_ids)
            if not overlap:
                for request, token in zip(requests, columns[-1], strict=True):
                    request.output_token_ids.append(token)
    columns += [step.result().token_ids for step in pending]
    return columns


@pytest.mark.gpu
def test_graphs_and_overlap_change_no_token(tmp_path: Path) -> None:
    eager = tokens_of(make_runner(tmp_path, False), overlap=False)
    graphed = make_runner(tmp_path, True)
    assert tokens_of(graphed, overlap=False) == eager
    assert tokens_of(graphed, overlap=True) == eager


@pytest.mark.gpu
def test_graphs_share_the_memory_of_their_logits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"vocab_size": 100_000}))
    config = runner_config(tmp_path, True, NUM_BLOCKS)
    runner = ModelRunner(config)
    runner._padded = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    runner._padded = runner._pad(config)
    shapes = shapes_of(runner._decode_rows, **runner._shape_options(config))
    assert torch.cuda.memory_reserved() - before < 4 * 100_000 * sum(shape.sampled for shape in shapes) / 2


@pytest.mark.gpu
def test_graphs_change_no_token_of_a_mixture_of_adapters(tmp_path: Path) -> None:
    graphed = make_runner(tmp_path, True, slots=3)
    mixed_ones = tokens_of(make_runner(tmp_path, False, slots=3), overlap=False, slots=3)
    assert tokens_of(graphed, overlap=False, slots=3) == mixed_ones
    assert tokens_of(graphed, overlap=True, slots=3) == mixed_ones
    without = tokens_of(make_runner(tmp_path, True), overlap=True)
    assert tokens_of(graphed, overlap=True) == without
    assert all(ours[0] == plain[0] for ours, plain in zip(mixed_ones, without, strict=True))
    changed = [any(ours[i] != plain[i] for ours, plain in zip(mixed_ones, without, strict=True)) for i in range(20)]
    assert changed == [i % 4 > 0 for i in range(20)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [0, 1 << 30])
def test_verified_guesses_change_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """Rows of guesses as chunks and as decodes, replayed as graphs; sampled requests, penalties, log-probabilities."""
    monkeypatch.setattr(model_runner, "SPREAD_HEADS", {"cuda": heads})
    runner, jobs = make_runner(tmp_path, True, guesses=True), mixed(24)
    plain, _ = run(runner, jobs, depth=2, num_blocks=599)
    answers = {str(index): one.token_ids for index, one in enumerate(plain)}
    guesser = always(Replay(answers, right=0.8, vocab_size=TINY["vocab_size"]))
    got, stats = run(runner, jobs, depth=2, num_blocks=599, speculator=guesser)
    assert [one.token_ids for one in got] == [one.token_ids for one in plain]
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 100


@pytest.mark.gpu
def test_a_sleep_gives_the_memory_back_and_changes_no_token(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, True, num_blocks=30_000)
    before = tokens_of(runner, overlap=True)
    awake, _ = torch.cuda.mem_get_info()
    runner.sleep()
    asleep, _ = torch.cuda.mem_get_info()
    assert asleep - awake >= runner.kv_cache.nbytes
    taken = torch.ones(runner.kv_cache.nbytes // 4, device="cuda")  # somebody else writes where the pool was
    del taken
    torch.cuda.empty_cache()
    runner.wake_up(runner_config(tmp_path, True, 30_000))
    assert not runner.kv_cache.any()
    assert tokens_of(runner, overlap=True) == before


LONG = {**TINY, "num_attention_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}


@pytest.mark.gpu
@torch.inference_mode()
def test_steps_that_transpose_values_of_an_fp8_cache_are_replayed(tmp_path: Path) -> None:
    """Three decodes beside a prompt of 3,800 tokens in chunks: as unpadded steps that multiply 16 bits have it. With
    these weights, rounding queries and weights takes 0.004 of the largest logit on the CPU."""
    (tmp_path / "config.json").write_text(json.dumps(LONG))
    config = EngineConfig(
        model=ModelConfig(path=str(tmp_path), load_format="dummy", dtype="bfloat16"),
        cache=CacheConfig(num_blocks=NUM_BLOCKS, dtype="fp8"),
        scheduler=SchedulerConfig(max_num_seqs=8),
        device="cuda",
    )
    runner = ModelRunner(config)
    if runner._room is None:
        pytest.skip("for Hopper")
    runner.kv_cache.view(torch.uint8).fill_(0x7F)  # NaN
    assert runner._padded is not None
    padded, room = runner._padded, runner._room
    prompts = [[5 * i + j % 90 + 1 for j in range(length)] for i, length in enumerate((40, 700, 1, 3800))]
    requests = [Request(str(i), p, SamplingParams(max_tokens=9), 0.0, slot=i) for i, p in enumerate(prompts)]
    for i, request in enumerate(requests):
        request.block_ids = [(i * 50 + block) * 7 % NUM_BLOCKS for block in range(50 if i < 3 else 240)]
    starts = [len(prompt) - 1 for prompt in prompts[:3]]
    for request, start in zip(requests, starts, strict=False):
        if start:
            runner.launch(StepPlan(chunks=[Chunk(request, 0, start, False, request.slot, request.block_ids)]))
    decodes = [Chunk(r, start, 1, True, r.slot, r.block_ids) for r, start in zip(requests, starts, strict=False)]
    transposed = []
    for start, length in ((0, 1500), (1500, 1500), (3000, 800)):
        late = Chunk(requests[3], start, length, start == 3000, 3, requests[3].block_ids)
        arrays, _ = build(StepPlan(chunks=[*decodes, late], num_decodes=3), runner._tables)
        runner._room = None
        expected = runner._model.logits(runner._forward(arrays, whole=False)[0]).float()
        runner._room = room
        unpadded = runner._model.logits(runner._forward(arrays, whole=False)[0]).float()
        room.view(torch.uint8).fill_(0x7F)
        shape = padded.shape_for(arrays)
        assert shape is not None
        logits = padded.launch(shape, arrays)[0].float()
        largest = expected.abs().max()
        assert (logits - expected).abs().max() < 0.05 * largest
        assert (unpadded - expected).abs().max() < 0.05 * largest
        transposed.append((shape.transposes, bool((room.view(torch.uint8) != 0x7F).any())))
    assert transposed == [(False, False), (True, True), (True, True)]


def test_fast_products_have_larger_shapes() -> None:
    """An 8B model's steps of 2,048 rows take an H200 longer than the host, in 16 bits, and not in FP8."""
    architecture = read_architecture(MODELS / "llama-3-8b")
    assert step_rows(architecture) == STEP_ROWS
    assert step_rows(architecture, fp8=True) == (*STEP_ROWS, 1792, 2048, 2304)
