"""How many blocks fit, and what is said when they do not."""

from __future__ import annotations

import pytest

from mainsail_engine.errors import OutOfMemoryError
from mainsail_engine.runner import memory


def test_the_pool_holds_every_slot_at_full_length_where_memory_allows(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1 << 40)
    assert memory.cpu_blocks(1000, max_num_seqs=4, max_model_len=320) == 4 * 21


def test_a_context_that_does_not_fit_says_what_does_and_what_to_set(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 4 * 101 * 1000)
    with pytest.raises(OutOfMemoryError, match=r"131072 tokens .* for 1600 tokens: set --max-model-len to 1600 or"):
        memory.cpu_blocks(1000, max_num_seqs=4, max_model_len=131072)
    assert memory.cpu_blocks(1000, max_num_seqs=4, max_model_len=1600) == 101
