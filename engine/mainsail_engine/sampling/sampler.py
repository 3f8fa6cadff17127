"""From logits to tokens, for a whole batch, with each request's own parameters.

The parameters live in one row of numbers per slot and travel with a step's other inputs. The random number of a token
depends on its request's seed and its position only, so a seeded request gives the same tokens in any batch.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import torch

from mainsail_engine.request import Request
from mainsail_kernels import sample as kernels


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of the rows to sample in this step; each array is [num_rows]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    steps: torch.Tensor
    all_greedy: bool


class SlotParameters:
    """Every slot's sampling parameters as arrays; a slot is filled when a request first runs in it."""

    def __init__(self, num_slots: int) -> None:
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.seeds = np.zeros(num_slots, np.int64)

    def fill(self, slot: int, request: Request) -> None:
        params = request.params
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seeds[slot] = self._seed(request)

    def all_greedy(self, slots: np.ndarray) -> bool:
        return bool((self.temperature[slots] <= 0).all())

    def _seed(self, request: Request) -> int:
        if request.params.seed is not None:
            return request.params.seed & 0x7FFFFFFFFFFFFFFF
        return secrets.randbits(63)

    def rows(self, slots: np.ndarray, positions: np.ndarray, device: torch.device) -> SamplingRows:
        """The parameters of these slots; positions [num_rows] are those of the tokens to be sampled."""

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)  # pyright: ignore[reportUnknownMemberType]

        return SamplingRows(
            temperature=on_device(self.temperature[slots]),
            top_k=on_device(self.top_k[slots]),
            top_p=on_device(self.top_p[slots]),
            min_p=on_device(self.min_p[slots]),
            seeds=on_device(self.seeds[slots]),
            steps=on_device(positions.astype(np.int64)),
            all_greedy=self.all_greedy(slots),
        )


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row, [n] int64; FAILED_TOKEN (-1) for a broken row. Waits for nothing: graphs hold it."""
    return kernels.argmax(logits)


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """One token per row, [n] int64; FAILED_TOKEN (-1) for a row that holds NaN or +inf or nothing but -inf."""
    if rows.all_greedy:
        return greedy(logits)
    return kernels.sample(
        logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.steps
    )  # fmt: skip
