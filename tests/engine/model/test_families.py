"""Every family of models against transformers on tiny random weights: logits, and greedy tokens past every window.

On the CPU, and where there is a GPU on it too, by its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.model.attention import Attention
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.step import Chunk, StepPlan

VOCAB = 96
WINDOW = 24
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 6, "num_local_experts": 6, "moe_intermediate_size": 24}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    given = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    return {"rope_parameters": given | more}


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama head_dim": {"head_dim": 24},
    "Llama rope linear": rope("linear"),
    "Llama rope llama3": rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "Llama rope yarn": rope("yarn"),
    "Llama rope yarn mscale": rope("yarn", mscale=0.8, mscale_all_dim=0.5, beta_fast=16.0, truncate=False),
    "Llama rope dynamic": {"max_position_embeddings": 64, **rope("dynamic")},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, **EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "Mixtral": EXPERTS,
    "GptOss": {"head_dim": 16, "sliding_window": WINDOW, "num_experts_per_tok": 2, "num_local_experts": 6,
               **rope("yarn", truncate=False)},
    "Llama biases": {"attention_bias": True},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0,
    },
    "Phi3": {"sliding_window": WINDOW},
    "Phi3 partial rotary": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "Phi3 longrope": {
        "original_max_position_embeddings": 64,
        **rope("longrope", long_factor=[1.0, 1.5, 2.0, 4.0], short_factor=[1.0, 1.0, 1.1, 1.2]),
    },
    "Olmo2": {},
    "Gemma": {"head_dim": 16},
    "Gemma2": {
        "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
    },
    "Gemma3": {
        "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "layer_types":
        ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "Gemma3 rope linear": {
        "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "Qwen2 rope yarn": rope("yarn"),
    "Qwen3 rope yarn": {"head_dim": 16, **rope("yarn")},
    "Qwen3Moe rope yarn": {"head_dim": 16, **EXPERTS, **rope("yarn")},
    "Mistral rope yarn": {"head_dim": 16, **rope("yarn", mscale=1.0, mscale_all_dim=1.0)},
    "Phi3 longrope partial rotary": {
        "original_max_position_embeddings": 64, "head_dim": 8,
        **rope("longrope", long_factor=[1.0, 2.0], short_factor=[1.0, 1.2], partial_rotary_factor=0.5),
    },
    "Olmo2 rope llama3": rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "Granite rope linear": rope("linear"),
}  # fmt: skip


LONG_ONLY = {"Llama rope dynamic": (256,), "Phi3 longrope": (90, 150), "Phi3 longrope partial rotary": (90, 150)}
"""Where transformers rotates by the length that a sequence has now, and Mainsail by the longest that it may get."""


def on_each_device(names: Iterable[str]) -> list[Any]:
    """Parameters (name, device)."""
    gpu = [pytest.param((name, "cuda"), marks=pytest.mark.gpu, id=f"{name} on cuda") for name in names]
    return [pytest.param((name, "cpu"), id=name) for name in names] + gpu


@pytest.fixture(scope="module", params=on_each_device(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, Any, str]:
    """(ours, transformers') with the same random weights, large enough for distinct logits."""
    import transformers

    variant, device = request.param
    family = variant.split()[0]
    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{kind}Config")(**COMMON | FAMILIES[variant])
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (2.0 if "sinks" in name else 0.2))
    path = tmp_path_factory.mktemp(family)
    model.save_pretrained(path)
    return runner_of(path, device), model, variant


def runner_of(path: Path, device: str = "cpu") -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(path=str(path), dtype="float32", max_model_len=256),
            cache=CacheConfig(num_blocks=64),
            scheduler=SchedulerConfig(max_num_seqs=4),
            device=device,
            cuda_graphs=False,  # the same arithmetic, and nothing to capture
        )
    )


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


BLOCKS = tuple(i * 7 % 61 for i in range(16))
"""A request's, out of order."""


def generate(
    runner: ModelRunner, prompt: list[int], count: int, chunk: int, blocks: Sequence[int] = BLOCKS
) -> list[int]:
    """Greedy tokens: the prompt in chunks, then one at a time, over a poisoned cache."""
    runner.kv_cache.fill_(float("nan"))
    request = Request("r", prompt, SamplingParams(max_tokens=count, temperature=0.0), 0.0, slot=0,
                      block_ids=list(blocks))  # fmt: skip
    done = 0
    while len(request.output_token_ids) < count:
        size = min(request.num_tokens - done, chunk)
        samples = done + size == request.num_tokens
        plan = StepPlan(chunks=[Chunk(request, done, size, samples, 0, request.block_ids)])
        plan.num_decodes = int(size == 1 and samples)
        request.output_token_ids += runner.launch(plan).result().token_ids
        done += size
    return request.output_token_ids


@torch.inference_mode()
def logits(runner: ModelRunner, prompt: list[int]) -> torch.Tensor:
    """[len(prompt), vocab] on the CPU."""
    n, model = len(prompt), runner._model
    with runner.device:
        attention = Attention(
            positions=torch.arange(n), slot_mapping=torch.arange(n),
            block_tables=torch.arange(-(-n // 16), dtype=torch.int32)[None],
            chunk_start=torch.tensor([0, n], dtype=torch.int32), seq_lens=torch.tensor([n], dtype=torch.int32),
            num_decodes=0, max_query_len=n,
        )  # fmt: skip
        return model.logits(model.forward(torch.tensor(prompt), attention, runner.kv_cache)).cpu()


def assert_close(runner: ModelRunner, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """As near as float32 is. A GPU multiplies it with 11 bits in attention; an expert chosen otherwise moves a row."""
    if runner.device.type == "cpu":
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-3)
        return
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert apart.median() < 0.02, f"the median row is {apart.median():.3f} apart"


def near_tie(runner: ModelRunner) -> float:
    """Nats between the best two tokens."""
    return 1e-3 if runner.device.type == "cpu" else 0.3


@torch.inference_mode()
def test_logits_equal_transformers(pair: tuple[ModelRunner, Any, str]) -> None:
    runner, model, family = pair
    for length in LONG_ONLY.get(family, (1, 17, 150)):
        prompt = prompt_of(length)
        theirs = model(torch.tensor([prompt])).logits[0]
        assert_close(runner, logits(runner, prompt), theirs)


@torch.inference_mode()
def test_greedy_tokens_equal_transformers(pair: tuple[ModelRunner, Any, str]) -> None:
    """Up to the first near-tie, with the prompt in chunks that no window divides."""
    runner, model, family = pair
    for length in set(LONG_ONLY.get(family, (5, 90))) & {5, 90}:
        prompt = prompt_of(length)
        ours = generate(runner, prompt, 12, chunk=37)
        for count in range(12):
            top = model(torch.tensor([prompt + ours[:count]])).logits[0, -1].log_softmax(-1).topk(2)
            if top.values[0] - top.values[1] < near_tie(runner):
                break
            assert ours[count] == int(top.indices[0]), f"token {count} after {length}"
