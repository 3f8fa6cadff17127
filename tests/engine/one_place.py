"""Logits as captured steps leave them: every step's in the same memory, which the next step may overwrite at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mainsail_engine.runner.model_runner import ModelRunner


def logits_in_one_place(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, on the CPU, where a launch computes at once: whoever reads a step's logits after the next launch has
    begun reads what is no number, or another step's. Returns how many rows each step had, as they come."""
    launch, to_logits = runner.launch, runner._model.logits
    place, used, rows = torch.empty(0), 0, list[int]()

    @torch.inference_mode()
    def launched(plan: Any) -> Any:
        place[:used] = float("nan")
        return launch(plan)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal place, used
        made = to_logits(hidden)
        if made.numel() > place.numel():
            place = torch.empty(2 * made.numel(), dtype=made.dtype)
        used = made.numel()
        rows.append(len(made))
        return place[:used].view(made.shape).copy_(made)

    monkeypatch.setattr(runner, "launch", launched)
    monkeypatch.setattr(runner._model, "logits", logits)
    return rows
