"""CUDA graphs: which sizes there are; and on a card, that replaying changes no token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.cuda_graphs import batch_sizes
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.step import Chunk, StepPlan

TINY = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 500,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("largest", [1, 3, 32, 33, 100, 256, 700, 1024])
def test_every_batch_up_to_the_largest_has_a_size(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    assert all(min(s for s in sizes if s >= n) - n <= max(n, 127) for n in range(1, largest + 1))


def test_beyond_1024_rows_steps_run_without_a_graph() -> None:
    assert batch_sizes(4000)[-1] == 1024


def make_runner(path: Path, graphs: bool) -> ModelRunner:
    (path / "config.json").write_text(json.dumps(TINY))
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(path=str(path), load_format="dummy", dtype="float32"),
            cache=CacheConfig(num_blocks=600),
            scheduler=SchedulerConfig(max_num_seqs=24),
            device="cuda",
            cuda_graphs=graphs,
        )
    )


def tokens_of(runner: ModelRunner, *, overlap: bool) -> list[list[int]]:
    """Twenty mixed requests: prefilled together, then 20 decode steps, each read at once or one step late."""
    runner.kv_cache.fill_(float("nan"))
    requests = []
    for i in range(20):
        prompt = torch.randint(0, 500, (3 + 9 * i,), generator=torch.Generator().manual_seed(i)).tolist()
        seeded = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 5 == 4 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=99, **seeded)
        blocks = [(i * 29 + b) * 7 % 599 for b in range(29)]
        requests.append(Request(str(i), prompt, params, 0.0, slot=i, block_ids=blocks))
    plans = [StepPlan(chunks=[Chunk(r, 0, r.num_tokens, True, r.slot, r.block_ids) for r in requests])]
    for n in range(20):
        chunks = [Chunk(r, len(r.prompt_token_ids) + n, 1, True, r.slot, r.block_ids) for r in requests]
        plans.append(StepPlan(chunks=chunks, num_decodes=len(chunks)))
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_and_overlap_change_no_token(tmp_path: Path) -> None:
    eager = tokens_of(make_runner(tmp_path, False), overlap=False)
    graphed = make_runner(tmp_path, True)
    assert tokens_of(graphed, overlap=False) == eager
    assert tokens_of(graphed, overlap=True) == eager
