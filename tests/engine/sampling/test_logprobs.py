"""Log-probabilities of a prompt: exact, and never more rows of logits at once than a piece has."""

from __future__ import annotations

import torch

from mainsail_engine.sampling.logprobs import PIECE, prompt_logprob_rows


def test_a_long_prompts_logits_never_lie_in_memory_at_once() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(5 * PIECE + 7, 8), torch.randn(8, 40)
    tokens = torch.randint(0, 40, (len(hidden),))
    sizes: list[int] = []

    def to_logits(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ head

    rows = prompt_logprob_rows(hidden, to_logits, tokens, num_best=3)
    assert max(sizes) == PIECE
    assert sum(sizes) == len(hidden)
    exact = torch.log_softmax((hidden.double() @ head.double()), dim=-1)
    best = exact.topk(3)
    assert torch.equal(rows.token_ids[:, 0].long(), tokens)
    torch.testing.assert_close(rows.logprobs[:, 0].double(), exact.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.logprobs[:, 1:].double(), best.values, atol=1e-5, rtol=0)
    assert torch.equal(rows.token_ids[:, 1:].long(), best.indices)
