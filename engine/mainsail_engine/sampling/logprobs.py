"""Log-probabilities of tokens, under the model's own distribution: before bias, penalties and temperature.

Computed in pieces of rows, so that a prompt's (vocabulary times every position) never lie in memory at once. All on the
device; `LogprobRows.to_host` starts the way to the CPU, `read` is for when it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mainsail_engine.protocol import TokenLogprobs
from mainsail_kernels.logits import best_logprobs

PIECE = 128
"""Rows at once: 64 MiB of float32 for a vocabulary of 128k."""


@dataclass(slots=True)
class LogprobRows:
    """Of each row the token that is there and the k best: token_ids and logprobs [n, 1 + k], ranks [n]."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor

    def to_host(self) -> LogprobRows:
        """On CUDA a copy in pinned memory, there once the stream has got so far."""
        if self.token_ids.device.type == "cpu":
            return self
        return LogprobRows(*(_pinned(tensor) for tensor in (self.token_ids, self.logprobs, self.ranks)))

    def read(self, wanted: Sequence[int]) -> list[TokenLogprobs]:
        """Each row with as many of the best tokens as it wanted."""
        ids: list[list[int]] = self.token_ids.numpy().tolist()
        values: list[list[float]] = self.logprobs.numpy().tolist()
        ranks: list[int] = self.ranks.numpy().tolist()
        return [
            TokenLogprobs(ids[row][: 1 + count], values[row][: 1 + count], ranks[row])
            for row, count in enumerate(wanted)
        ]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)


def logprob_rows(logits: torch.Tensor, tokens: torch.Tensor, num_best: int) -> LogprobRows:
    """logits [n, vocab], tokens [n] int64: their log-probabilities, and those of the num_best best."""
    pieces = [
        _piece(logits[first : first + PIECE], tokens[first : first + PIECE], num_best)
        for first in range(0, len(tokens), PIECE)
    ]
    return _joined(pieces)


def prompt_logprob_rows(
    hidden: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, num_best: int
) -> LogprobRows:
    """The same from hidden states [n, hidden_size]: the token that follows each is in tokens [n]."""
    pieces = [
        _piece(to_logits(hidden[first : first + PIECE]), tokens[first : first + PIECE], num_best)
        for first in range(0, len(tokens), PIECE)
    ]
    return _joined(pieces)


def _joined(pieces: list[LogprobRows]) -> LogprobRows:
    if len(pieces) == 1:
        return pieces[0]
    return LogprobRows(
        torch.cat([piece.token_ids for piece in pieces]),
        torch.cat([piece.logprobs for piece in pieces]),
        torch.cat([piece.ranks for piece in pieces]),
    )


def _piece(logits: torch.Tensor, tokens: torch.Tensor, num_best: int) -> LogprobRows:
    return LogprobRows(*best_logprobs(logits, tokens, min(num_best, logits.shape[1])))
