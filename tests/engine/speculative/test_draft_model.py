"""Guesses from a draft model: a tiny random one, the model itself, and pools that are too small for it."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from tests.engine.test_sampling_equivalences import MAX_LEN, VOCAB, mixed, reference, run, same, tiny
from tests.engine.tiny import make_tiny_model

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from mainsail_engine.core import EngineCore, build
from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.protocol import Add, Control, Controlled
from mainsail_engine.request import SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.speculative.draft_model import DraftModel, draft_blocks
from mainsail_engine.speculative.load import check_vocabularies, load_draft
from mainsail_engine.speculative.speculator import Speculator

__all__ = ["reference", "tiny"]
"""Fixtures."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A draft of other random weights, with the same vocabulary."""
    import torch
    import transformers

    torch.manual_seed(11)
    settings = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX_LEN, eos_token_id=VOCAB - 1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("draft")
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(path)
    return path


def config(path: Path, blocks: int) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(path), max_model_len=MAX_LEN, dtype="float32"),
        cache=CacheConfig(num_blocks=blocks),
        scheduler=SchedulerConfig(max_num_seqs=40, max_num_batched_tokens=512),
        device="cpu",
    )


@pytest.fixture(scope="module")
def draft(folder) -> ModelRunner:
    return ModelRunner(config(folder, 64))


def speculator(runner, num_slots: int = 40, budget: int = 512) -> tuple[Speculator, DraftModel]:
    source = DraftModel(runner, num_slots=num_slots, budget=budget)
    wanted = SpeculativeConfig(method="draft_model", model="-", num_speculative_tokens=5, adaptive=False)
    return Speculator(wanted, source), source


@pytest.mark.parametrize("limits", [{}, {"num_slots": 3}, {"budget": 40}])
@pytest.mark.parametrize("engine", [{"depth": 2}, {"num_blocks": 12, "watermark": 0.0, "depth": 2}])
def test_a_draft_changes_nothing(tiny, reference, draft, limits, engine):
    made, source = speculator(draft, **limits)
    got, stats = run(tiny[0], mixed(32), speculator=made, **engine)
    same(got, reference)
    source.check_integrity()
    assert stats.num_draft_tokens > stats.num_accepted_tokens
    assert not source._copies


def test_the_model_as_its_own_draft_is_always_right(tiny, reference, tmp_path):
    """Greedy and sampled with filters: the draft draws with the same numbers."""
    tiny[1].save_pretrained(tmp_path)
    made, source = speculator(ModelRunner(config(tmp_path, 400)))
    plain, jobs = [index for index in range(32) if index % 8 in (0, 1, 2)], mixed(32)
    got, stats = run(tiny[0], [jobs[index] for index in plain], speculator=made)
    same(got, [reference[index] for index in plain])
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 80
    source.check_integrity()


def test_a_draft_of_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(InvalidConfigurationError, match=r"vocabulary of 96 tokens, the model one of 265"):
        check_vocabularies(96, 265)
    wanted = SpeculativeConfig(model=str(tmp_path / "none"))
    with pytest.raises(InvalidConfigurationError, match=r"draft model .*none does not exist"):
        load_draft(EngineConfig(model=ModelConfig(path="-"), speculative=wanted, device="cpu"))


def test_a_draft_is_loaded_with_a_pool_of_its_own(tmp_path):
    path = make_tiny_model(tmp_path / "draft", max_len=256)
    wanted = SpeculativeConfig(method="draft", model=str(path))
    loaded = load_draft(EngineConfig(model=ModelConfig(path="-"), speculative=wanted, device="cpu"))
    assert loaded.runner.num_blocks >= 256 // 16 + 1
    assert loaded.runner.max_model_len == 256
    assert loaded.source().last_s == 0.0


def test_the_drafts_pool_is_bounded_and_holds_one_request_at_least():
    assert draft_blocks(100, max_num_seqs=4, max_model_len=8192, room_bytes=10**9) == 4 * 256
    assert draft_blocks(100, max_num_seqs=4, max_model_len=8192, room_bytes=60_000) == 600
    assert draft_blocks(100, max_num_seqs=4, max_model_len=8192, room_bytes=0) == 513


def test_an_engine_with_a_draft_answers_sleeps_and_answers_again(tmp_path):
    """The whole of a core, as `serve` makes it; the draft is the model itself."""
    path = make_tiny_model(tmp_path / "model", max_len=256)
    wanted = SpeculativeConfig(method="draft_model", model=str(path), num_speculative_tokens=4, adaptive=False)
    plain = EngineConfig(model=ModelConfig(path=str(path)), cache=CacheConfig(num_blocks=64), device="cpu")
    answers: list[list[int]] = []
    for speculative in (None, wanted):
        core, _ = build(msgspec.structs.replace(plain, speculative=speculative))
        answers.append(tokens_of(core, "a"))
        core.handle(Control("s", "sleep"), time.monotonic())
        assert core.control() == Controlled("s", None)
        core.handle(Control("w", "wake_up"), time.monotonic())
        assert core.control() == Controlled("w", None)
        answers.append(tokens_of(core, "b"))
        stats = core._scheduler.stats()
        assert (stats.num_accepted_tokens > 20) == (speculative is not None)
    assert all(answer == answers[0] for answer in answers)


def tokens_of(core: EngineCore, name: str) -> list[int]:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    core.handle(Add(name, [5, 6, 7], params), time.monotonic())
    tokens: list[int] = []
    while core.has_work:
        step = core.step(time.monotonic())
        tokens += [token for output in (step.outputs if step else []) for token in output.token_ids]
    return tokens
