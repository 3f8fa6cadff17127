"""Presence, frequency and repetition penalties, from counts that live on the device.

    counts[slot, token]    bit 30: the prompt has it        bits 0 .. 29: how often the answer has it

One row of int32 for each slot, made when the first request asks for penalties. A row is written when a request moves
in; from then on every sampled token is counted right after its draw, on the device, so that the next step sees it
whether or not the CPU has. Definitions as in OpenAI's API (presence, frequency) and in Keskar et al., "CTRL", 2019
(repetition).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mainsail_engine.request import Request
from mainsail_kernels.logits import penalize
from mainsail_kernels.reference import IN_PROMPT

PIECE = 64
"""Rows of guesses that are penalized at once: bounds the copy of their counts."""


class TokenCounts:
    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (num_slots, vocab_size), device
        self._counts: torch.Tensor | None = None
        self._penalties = np.zeros((3, num_slots), np.float32)

    def _table(self) -> torch.Tensor:
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        return self._counts

    def move_in(self, slot: int, request: Request) -> None:
        """Write the slot's row from the request's prompt and its output so far."""
        params = request.params
        self._penalties[:, slot] = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        row = self._table()[slot]
        row.zero_()
        row[self._up(np.unique(np.array(request.prompt_token_ids, np.int64)))] = IN_PROMPT
        if request.output_token_ids:
            tokens, times = np.unique(np.array(request.output_token_ids, np.int64), return_counts=True)
            row[self._up(tokens)] += self._up(times.astype(np.int32))

    def penalize(
        self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray, guessed: Mapping[int, Sequence[int]]
    ) -> None:
        """In place, those rows of logits [n, vocab] (float32) whose slots ask for it. guessed: see Sampler.sample."""
        ahead = np.array([bool(guessed.get(row)) for row in rows.tolist()], bool)
        sampled, verifying, table = rows[~ahead], rows[ahead], self._table()
        if len(sampled):
            self._penalize(logits, sampled, slots[sampled], table, self._up(slots[sampled]))
        for first in range(0, len(verifying), PIECE):
            some = verifying[first : first + PIECE]
            counts = table[self._up(slots[some])]
            pairs = [(place, token) for place, row in enumerate(some.tolist()) for token in guessed[row]]
            places, tokens = self._up(np.ascontiguousarray(np.array(pairs, np.int64).T))
            counts.index_put_((places, tokens), torch.ones_like(places, dtype=torch.int32), accumulate=True)
            self._penalize(logits, some, slots[some], counts, torch.arange(len(some), device=self._device))

    def _penalize(
        self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray, counts: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Those rows, of these slots, by the counts in these rows of `counts`."""
        presence, frequency, repetition = self._up(np.ascontiguousarray(self._penalties[:, slots]))
        penalize(logits, counts, self._up(rows), places, presence, frequency, repetition)

    def catch_up(self, slot: int, tokens: Sequence[int]) -> None:
        """These tokens were generated without having been counted."""
        placed = self._up(np.array(tokens, np.int64))
        self._table()[slot].index_add_(0, placed, torch.ones_like(placed, dtype=torch.int32))

    def count(self, slots: np.ndarray, tokens: torch.Tensor, rows: np.ndarray) -> None:
        """The tokens [n] of these rows were just drawn."""
        index, held = self._up(rows), self._up(slots[rows])
        places = held * self._shape[1] + tokens[index].clamp(min=0)
        ones = torch.ones(len(rows), dtype=torch.int32, device=self._device)
        self._table().view(-1).index_add_(0, places, ones)

    def _up(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)  # pyright: ignore[reportUnknownMemberType]
