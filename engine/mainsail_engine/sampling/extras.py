"""What a launched step brings besides tokens: log-probabilities and embeddings on their way to the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from mainsail_engine.sampling.logprobs import LogprobRows
from mainsail_engine.sampling.sampler import Sampled
from mainsail_engine.step import ChunkExtras, StepPlan


@dataclass(slots=True)
class PendingExtras:
    """By a chunk's place in the plan. `read` is for when the device has got past the step."""

    tokens: list[tuple[LogprobRows, list[int], list[int]]] = field(
        default_factory=list[tuple[LogprobRows, list[int], list[int]]]
    )
    """Log-probabilities of sampled tokens, the chunks that they belong to, how many of the best each wants."""
    prompts: list[tuple[int, LogprobRows, int]] = field(default_factory=list[tuple[int, LogprobRows, int]])
    embeddings: list[tuple[int, torch.Tensor]] = field(default_factory=list[tuple[int, torch.Tensor]])

    def add_sampled(self, sampled: Sampled, plan: StepPlan) -> None:
        if sampled.logprobs is None or sampled.logprob_rows is None or sampled.num_logprobs is None:
            return
        rows_of_chunks = [chunk.samples + len(chunk.guesses) for chunk in plan.chunks]
        sampling = np.repeat(np.arange(len(rows_of_chunks)), rows_of_chunks)
        owners = sampling[sampled.logprob_rows].tolist()
        self.tokens.append((sampled.logprobs.to_host(), owners, sampled.num_logprobs.tolist()))

    def add_prompt(self, index: int, rows: LogprobRows, num_best: int) -> None:
        self.prompts.append((index, rows.to_host(), num_best))

    def add_embedding(self, index: int, vector: torch.Tensor) -> None:
        if vector.device.type != "cpu":
            on_host = torch.empty(vector.shape, dtype=torch.float32, pin_memory=True)
            vector = on_host.copy_(vector, non_blocking=True)
        self.embeddings.append((index, vector))

    def read(self) -> dict[int, ChunkExtras]:
        extras: dict[int, ChunkExtras] = {}
        for rows, owners, wanted in self.tokens:
            for index, logprobs in zip(owners, rows.read(wanted), strict=True):
                of_chunk = extras.setdefault(index, ChunkExtras())
                of_chunk.logprobs = [*(of_chunk.logprobs or ()), logprobs]
        for index, rows, num_best in self.prompts:
            prompt_logprobs = rows.read([num_best] * len(rows.token_ids))
            extras.setdefault(index, ChunkExtras()).prompt_logprobs = prompt_logprobs
        for index, vector in self.embeddings:
            extras.setdefault(index, ChunkExtras()).embedding = vector.numpy().astype(np.float32).tobytes()
        return extras
