"""Flags: the field's own spellings are taken, and mean what they mean there."""

from __future__ import annotations

import pytest

from mainsail_engine.cli import build_parser, engine_config, server_config
from mainsail_engine.errors import InvalidConfigurationError

SERVE = ["serve", "--model", "m"]


def test_what_is_on_or_off_anyway_is_accepted() -> None:
    parsed = build_parser().parse_args(
        [*SERVE, "--enable-chunked-prefill", "--disable-log-requests", "--enable-prefix-caching"]
    )
    plain = build_parser().parse_args(SERVE)
    assert engine_config(parsed) == engine_config(plain)
    assert server_config(parsed) == server_config(plain)


def test_requests_are_logged_by_flag_only() -> None:
    assert not server_config(build_parser().parse_args(SERVE)).log_requests
    assert server_config(build_parser().parse_args([*SERVE, "--enable-log-requests"])).log_requests


def test_a_shortened_flag_is_refused() -> None:
    """What a service's extraArgs may not set (spec.engine's own flags) cannot be set by half a name either."""
    for flag in ("--max-model-le", "--enable-lor"):
        with pytest.raises(InvalidConfigurationError, match=flag):
            build_parser().parse_args([*SERVE, flag, "8"])


def test_adapters_given_in_two_places_add_up() -> None:
    """A service's spec.adapters and its extraArgs, say."""
    parsed = build_parser().parse_args([*SERVE, "--lora-modules", "a=/a", "b=/b", "--lora-modules", "c=/c"])
    lora = engine_config(parsed).lora
    assert lora is not None
    assert lora.modules == (("a", "/a"), ("b", "/b"), ("c", "/c"))
