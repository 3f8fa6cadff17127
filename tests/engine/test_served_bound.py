"""The least time of a row, against schedules that anybody can name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks.served_bound import ROWS, kinds, least_s
from benchmarks.served_sim import H200
from hypothesis import given
from hypothesis import strategies as st

COST = H200()
P8 = ROWS["P8"]


def test_prompts_alone_and_decodes_alone_are_no_faster():
    steps = {(d, p): t for d, p, t in kinds(P8, COST, 0.04)}
    apart_s = P8.prompt_tokens / 8192 * steps[0, 8192] + P8.output_tokens / 64 * steps[64, 0]
    assert least_s(P8, COST, 0.04) <= apart_s


@given(st.floats(0.0, COST.mixed), st.sampled_from([0.02, 0.04, 1.0]))
def test_cheaper_and_longer_steps_never_take_more(mixed, longest_s):
    cost = replace(COST, mixed=mixed)
    assert least_s(P8, cost, longest_s) <= least_s(P8, COST, 0.02) + 1e-9


def test_twice_the_work_takes_twice_as_long():
    twice = replace(P8, output_tokens=2 * P8.output_tokens, prompt_tokens=2 * P8.prompt_tokens)
    assert least_s(twice, COST, 0.04) == pytest.approx(2 * least_s(P8, COST, 0.04))
