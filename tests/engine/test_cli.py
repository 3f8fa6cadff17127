"""Flags: the field's own spellings, and what a profile stands for."""

from __future__ import annotations

import pytest

from mainsail_engine.cli import build_parser, engine_config, server_config
from mainsail_engine.config import EngineConfig, SpeculativeConfig


def configured(*flags: str) -> EngineConfig:
    return engine_config(build_parser().parse_args(["serve", "--model", "m", *flags]))


def test_without_a_profile_the_defaults_hold() -> None:
    plain = EngineConfig(model=configured().model)
    assert configured() == plain


def test_latency_is_few_at_once_in_small_steps_with_guesses() -> None:
    quick = configured("--profile", "latency")
    assert (quick.scheduler.max_num_seqs, quick.scheduler.max_num_batched_tokens) == (64, 2048)
    assert quick.speculative == SpeculativeConfig(method="ngram", adaptive=True)


def test_throughput_is_many_at_once_in_large_steps_without() -> None:
    bulk = configured("--profile", "throughput")
    assert (bulk.scheduler.max_num_seqs, bulk.scheduler.max_num_batched_tokens) == (512, 16384)
    assert bulk.speculative is None


@pytest.mark.parametrize("profile", ["latency", "throughput"])
def test_what_is_given_goes_before_the_profile(profile: str) -> None:
    flags = ("--max-num-seqs", "7", "--max-num-batched-tokens", "99", "--speculative-config")
    given = configured("--profile", profile, *flags, '{"method": "ngram", "num_speculative_tokens": 2}')
    assert (given.scheduler.max_num_seqs, given.scheduler.max_num_batched_tokens) == (7, 99)
    assert given.speculative == SpeculativeConfig(method="ngram", num_speculative_tokens=2)


def test_the_fields_spellings_are_taken() -> None:
    flags = ["serve", "--model", "m", "--enable-chunked-prefill", "--disable-log-requests", "--enable-prefix-caching"]
    parsed = build_parser().parse_args(flags)
    assert engine_config(parsed) == configured()
    assert not server_config(parsed).log_requests
    assert server_config(build_parser().parse_args(["serve", "--model", "m", "--enable-log-requests"])).log_requests
