"""A prompt's embedding from its hidden states, chunk by chunk: their mean, the last one, or the first.

A mean is summed up over the chunks in float32. The sum belongs to the request and not to its slot: a request may move
between two chunks, and one that begins anew (position 0) begins its sum anew.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from mainsail_engine.request import Pooling, Request


class Pooler:
    def __init__(self) -> None:
        self._sums: WeakKeyDictionary[Request, torch.Tensor] = WeakKeyDictionary()

    def add(self, request: Request, start: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [num_tokens, hidden_size] of positions from start on. The embedding, once the prompt is complete."""
        stop = start + hidden.shape[0]
        complete = stop >= len(request.prompt_token_ids)
        if request.params.pooling is Pooling.LAST:
            return hidden[-1].float() if complete else None
        if request.params.pooling is Pooling.CLS:
            if start == 0:
                self._sums[request] = hidden[0].float()
            return self._sums[request] if complete else None
        total = hidden.float().sum(dim=0)
        if start > 0:
            total += self._sums[request]
        self._sums[request] = total
        return total / stop if complete else None
