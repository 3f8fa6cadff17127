"""Tensor parallelism as a model sees it: which part of every matrix is its own, and the sums that join the parts.

Megatron-LM's split (Shoeybi et al., 2019): the first matrix of attention and of the MLP by outputs (heads, channels),
the second by inputs, and one sum over all ranks after each. Key and value heads are split too, or repeated when there
are fewer of them than ranks. The embedding and the head are split by the vocabulary, whose size is rounded up so that
all parts are alike; logits are gathered, so that every rank samples the same tokens.

`Parallel` alone is a single rank: nothing is split and nothing is exchanged. `runner/distributed.py` has the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Parallel:
    rank: int = 0
    size: int = 1

    def part(self, total: int) -> slice:
        """This rank's of `total` rows or columns in equal parts; the last one ends at `total`."""
        each = -(-total // self.size)
        return slice(min(self.rank * each, total), min((self.rank + 1) * each, total))

    def kv_heads(self, num_kv_heads: int) -> slice:
        """This rank's key and value heads: a share, or the one that its query heads look at."""
        if num_kv_heads >= self.size:
            return self.part(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return slice(head, head + 1)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x; may overwrite x."""
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' [n, columns] side by side, in the order of the ranks."""
        return x

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return number


SINGLE = Parallel()


def check_divides(a: Architecture, size: int) -> None:
    """Raises InvalidConfigurationError, naming the sizes that do, when the model cannot be split over `size` ranks."""
    if size == 1 or _divides(a, size):
        return
    if a.bidirectional:
        raise InvalidConfigurationError(f"--tensor-parallel-size {size}: encoders ({a.name}) run on one device")
    if a.generic:
        raise InvalidConfigurationError(
            f"--tensor-parallel-size {size}: {a.name} is computed by transformers' modules, which run on one device"
        )
    good = ", ".join(str(n) for n in (1, 2, 4, 8, 3, 5, 6, 7) if n == 1 or _divides(a, n))
    raise InvalidConfigurationError(
        f"--tensor-parallel-size {size} does not divide the model ({a.num_heads} query heads, "
        f"{a.num_kv_heads} key/value heads, MLP of {a.intermediate_size}); these do: {good}"
    )


def _divides(a: Architecture, size: int) -> bool:
    kv = a.num_kv_heads % size == 0 or size % a.num_kv_heads == 0
    widths = [a.intermediate_size, *([a.experts.intermediate_size] if a.experts else [])]
    return (
        not a.generic
        and not a.bidirectional
        and a.name != "Olmo2ForCausalLM"
        and kv
        and a.num_heads % size == 0
        and all(w % size == 0 for w in widths)
    )
