"""--profile: what it sets, and that a flag of its own goes before it."""

from __future__ import annotations

from mainsail_engine.cli import build_parser, engine_config
from mainsail_engine.config import EngineConfig, SpeculativeConfig


def config(*flags: str) -> EngineConfig:
    return engine_config(build_parser().parse_args(["serve", "--model", "m", *flags]))


def test_without_a_profile_one_token_a_step() -> None:
    assert config().speculative is None


def test_latency_guesses_from_the_text_and_throughput_does_not() -> None:
    fast, wide = config("--profile", "latency"), config("--profile", "throughput")
    assert fast.speculative == SpeculativeConfig(method="ngram", adaptive=True)
    assert wide.speculative is None
    assert fast.scheduler.max_num_seqs < wide.scheduler.max_num_seqs


def test_a_flag_goes_before_the_profile() -> None:
    assert config("--profile", "latency", "--speculative-config", "null").speculative is None
    own = config("--profile", "latency", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}')
    assert own.speculative is not None
    assert own.speculative.num_speculative_tokens == 3
    assert config("--profile", "throughput", "--max-num-seqs", "7").scheduler.max_num_seqs == 7


def test_stages_need_steps_without_guesses() -> None:
    assert config("--profile", "latency", "--pipeline-parallel-size", "2").speculative is None
