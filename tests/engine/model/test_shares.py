"""Tensor parallelism at the disk: a rank reads its share of every matrix, and no more of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.model.test_lora import base_model

from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.loader import Weights
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.registry import DECODERS
from mainsail_engine.model.sources import ALL, SafetensorsSource


class Counted(SafetensorsSource):
    """Remembers how many numbers of each tensor were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: dict[str, int] = {}

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        part = super().tensor(name, rows, columns)
        self.read[name] = self.read.get(name, 0) + part.numel()
        return part


def numbers_read(folder: Path, parallel: Parallel) -> dict[str, int]:
    a, device = read_architecture(folder), torch.device("cpu")
    source = Counted(folder)
    weights = Weights(source, device, torch.float32)
    DECODERS[a.name](a, weights, max_positions=64, device=device, parallel=parallel)
    return source.read


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_a_rank_reads_its_share_of_every_matrix(family: str, tmp_path: Path) -> None:
    """All but norms and routers; of the 2 key and value heads four ranks have one each, two of them the same."""
    base_model(family).save_pretrained(tmp_path)
    whole = numbers_read(tmp_path, Parallel())
    for size in (2, 4):
        for rank in range(size):
            read = numbers_read(tmp_path, Parallel(rank, size))
            assert read.keys() == whole.keys()
            for name, count in read.items():
                shared = "norm" in name or name.endswith(".gate.weight")
                share = 1 if shared else min(size, 2) if ".k_proj" in name or ".v_proj" in name else size
                assert count * share == whole[name], name
