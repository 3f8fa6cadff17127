"""Rotations past the trained context: real models' frequencies against transformers', and what a batch changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.model.test_families import COMMON, logits, prompt_of, rope, runner_of

from mainsail_engine.model.families import rope_of
from mainsail_engine.model.rotary import cos_sin_table, frequencies

LONG = [1.0 + i * 63 / 47 for i in range(48)]
SHORT = [1.0 + i * 2 / 47 for i in range(48)]
REAL: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 3.1": (128, {
        "max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}}),
    "Qwen3 with YaRN": (128, {
        "max_position_embeddings": 32768, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}}),
    "gpt-oss": (64, {
        "max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096, "rope_theta": 150000.0}}),
    "YaRN with mscale": (64, {
        "max_position_embeddings": 163840, "rope_parameters": {
            "rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 4096, "rope_theta": 10000.0}}),
    "Phi-3 128k": (96, {
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_parameters": {
            "rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "rope_theta": 10000.0}}),
    "dynamic NTK": (128, {
        "max_position_embeddings": 4096, "rope_parameters": {
            "rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    "linear": (128, {
        "max_position_embeddings": 4096, "rope_parameters": {
            "rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_frequencies_of_real_models_equal_transformers(name: str) -> None:
    """In engines for less than the trained context, for just as much, and for far more."""
    from transformers import LlamaConfig, Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim, config = REAL[name]
    given = rope_of(config)
    kind: Any = Phi3Config if given.kind == "longrope" else LlamaConfig
    theirs = kind(hidden_size=dim * 2, num_attention_heads=2, **config)
    original = given.original_max_position_embeddings
    for positions in (original // 2, original, original + 1, 4 * original):
        truth, factor = ROPE_INIT_FUNCTIONS[given.kind](theirs, device=torch.device("cpu"), seq_len=positions)
        torch.testing.assert_close(frequencies(given, dim, positions).float(), truth.float(), rtol=2e-6, atol=0)
        assert given.attention_factor == pytest.approx(factor)


def test_angles_far_out_are_exact() -> None:
    """At 131,071 a float32 angle is off by hundredths; the table's are computed in float64."""
    dim, config = REAL["Llama 3.1"]
    given = rope_of(config)
    table = cos_sin_table(given, dim, 131072, torch.device("cpu"))
    for channel, frequency in enumerate(frequencies(given, dim, 131072).tolist()):
        assert float(table[131071, channel]) == pytest.approx(math.cos(131071 * frequency), abs=1e-6)
        assert float(table[131071, dim // 2 + channel]) == pytest.approx(math.sin(131071 * frequency), abs=1e-6)


@torch.inference_mode()
def test_dynamic_frequencies_are_those_of_the_longest_context_whatever_a_batch_holds(tmp_path: Path) -> None:
    """transformers stretches with the longest sequence that it has seen, so that a text's logits depend on what was
    there before it, and cached keys no longer fit. Here all is rotated for the engine's context from the start: a
    short prompt gives what transformers gives for it after one of that length."""
    import transformers

    config = transformers.LlamaConfig(**COMMON | {"max_position_embeddings": 64, **rope("dynamic")})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    runner = runner_of(tmp_path)
    short, longest = prompt_of(100), prompt_of(256)
    ours = logits(runner, short)
    before = model(torch.tensor([short])).logits[0]
    torch.testing.assert_close(logits(runner, longest), model(torch.tensor([longest])).logits[0], rtol=2e-4, atol=2e-3)
    torch.testing.assert_close(ours, model(torch.tensor([short])).logits[0], rtol=2e-4, atol=2e-3)
    assert not torch.allclose(ours, before, rtol=2e-4, atol=2e-3)
    torch.testing.assert_close(logits(runner, short), ours, rtol=0, atol=0)
