"""Stages of real processes over gloo, in one node: the same tokens as one rank, and a stage that dies ends the engine.

Two nodes are in tests/engine/server/test_nodes.py, what stages compute in tests/engine/model/test_stages.py.
"""

from __future__ import annotations

import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.engine.processes import children
from tests.engine.tiny import HIDDEN, LAYERS, make_tiny_model

from mainsail_engine.client import EngineDeadError
from mainsail_engine.errors import StartupError
from mainsail_engine.llm import LLM, LoRARequest, SamplingParams, StructuredOutputsParams

SHORT = SamplingParams(
    max_tokens=40, min_tokens=20, temperature=1.0, seed=3, frequency_penalty=0.5,
    structured_outputs=StructuredOutputsParams(regex="[a-z]{3,9}"),
)  # fmt: skip
COMMON: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("stages") / "model", max_len=512)


def make_adapter(folder: Path) -> Path:
    """For every layer, strong enough to be seen."""
    folder.mkdir()
    random = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{factor}.weight": torch.randn(
            (4, HIDDEN) if factor == "A" else (HIDDEN, 4), generator=random
        )
        for layer in range(LAYERS)
        for factor in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder


@cache
def answers(model: Path, adapter: Path | None, stages: int, ranks: int) -> list[list[int]]:
    """Greedy and drawn, from prompts that share a beginning, in a pool that is too small; then under a grammar that is
    complete before min_tokens; then through an adapter."""
    prompts: Any = [{"prompt_token_ids": [5, 6, 7, 8] * 8 + [n] * n} for n in (1, 9, 30, 55)] * 2
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    drawn = [SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    with LLM(
        str(model), pipeline_parallel_size=stages, tensor_parallel_size=ranks, kv_cache_blocks=28,
        enable_lora=adapter is not None, **COMMON,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, [greedy] * 4 + drawn)
        outputs += llm.generate(prompts[:4], SHORT)
        if adapter is not None:
            outputs += llm.generate(prompts[:4], greedy, lora_request=LoRARequest("a", 1, str(adapter)))
    return [output.outputs[0].token_ids for output in outputs]


def test_two_stages_of_two_ranks_give_the_tokens_of_one(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    alone = answers(tiny, adapter, 1, 1)
    assert all(3 < len(tokens) < 12 for tokens in alone[8:12])
    assert alone[12:] != alone[:4]
    assert answers(tiny, adapter, 2, 2) == alone


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_every_family_over_processes(family: str, ranks: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.engine.runner.test_tensor_parallel import make_models

    root = make_models(tmp_path_factory.mktemp("families"))
    assert answers(root / family, None, 2, ranks) == answers(root / family, None, 1, 1)


@pytest.mark.slow
def test_more_stages_than_layers_are_refused_with_those_that_fit(tiny: Path) -> None:
    with pytest.raises(StartupError, match="the model has 2 layers, and every stage needs one; these fit: 1 to 2"):
        LLM(str(tiny), pipeline_parallel_size=3, **COMMON)


@pytest.mark.parametrize("kill", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["SIGKILL", "SIGSTOP"])
def test_a_lost_stage_is_noticed_and_ends_the_engine(tiny: Path, kill: bool) -> None:
    """In the middle of an answer: it ends with an error, and the core process is gone."""
    others = children("mainsail_engine.core") | children("tp_worker")
    llm = LLM(str(tiny), pipeline_parallel_size=2, kv_cache_blocks=250, **COMMON)
    (core,) = children("mainsail_engine.core") - others
    (stage,) = children("tp_worker") - others
    long = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": [5, 6, 7]}] * 64

    def answer_for_ever() -> None:
        while True:
            llm.generate(prompts, long)

    try:
        threading.Timer(0.3, stage.kill if kill else stage.suspend).start()
        with pytest.raises(EngineDeadError, match=r"rank 1 (was killed by signal 9|has been silent)"):
            answer_for_ever()
        core.wait(timeout=240)
    finally:
        if stage.is_running():
            stage.kill()
        llm.close()
