"""Flags: the field's own spellings are taken, and mean what they mean there."""

from __future__ import annotations

from mainsail_engine.cli import build_parser, engine_config, server_config

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
