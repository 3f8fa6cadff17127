"""Parallelism as a model sees it: which layers are its own, which part of every matrix, and what joins the parts.

Megatron-LM's split (Shoeybi et al., 2019): the first matrix of attention and of the MLP by outputs (heads, channels),
the second by inputs, and one sum over all ranks after each. Key and value heads are split too, or repeated when there
are fewer of them than ranks. The embedding and the head are split by the vocabulary, whose size is rounded up so that
all parts are alike; logits are gathered, so that every rank samples the same tokens.

Above that, the layers may be split into stages, as in GPipe (Huang et al., 2019): the first has the embedding, the last
the head, and each passes its hidden states on to the next. The ranks of one stage split its matrices as above.

    ranks   0 ── 1      stage 0: embedding, layers 0 …        2 stages of 2 ranks
            ▼    ▼
            2 ── 3      stage 1: layers …, norm, head

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
    """Among those that share the stage's matrices."""
    size: int = 1
    """How many share them."""
    stage: int = 0
    num_stages: int = 1

    @property
    def is_first(self) -> bool:
        """It has the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """It has the head, and samples."""
        return self.stage == self.num_stages - 1

    @property
    def is_alone(self) -> bool:
        return self.size == self.num_stages == 1

    def layers(self, a: Architecture) -> range:
        """This stage's."""
        counts = stage_sizes(a.num_layers, self.num_stages, _layers_in_head(a) if self.num_stages > 1 else 0.0)
        first = sum(counts[: self.stage])
        return range(first, first + counts[self.stage])

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
        """The smallest of all ranks' numbers, over all stages."""
        return number

    def pass_on(self, hidden: torch.Tensor) -> None:
        """Send hidden states [num_tokens, hidden_size] to the next stage; they must not be changed any more."""
        raise RuntimeError("there is no next stage")

    def receive(self, out: torch.Tensor) -> torch.Tensor:
        """Fill out [num_tokens, hidden_size] with what the stage before passed on. Returns it."""
        raise RuntimeError("there is no stage before")


SINGLE = Parallel()


def stage_sizes(num_layers: int, num_stages: int, head: float) -> list[int]:
    """Layers of each stage, so that the slowest is as fast as can be. head: the head's work, in layers."""
    if num_stages == 1:
        return [num_layers]
    others = num_stages - 1
    last = max(1, min(round((num_layers + head) / num_stages - head), num_layers - others))
    each, more = divmod(num_layers - last, others)
    return [each + (stage < more) for stage in range(others)] + [last]


def _layers_in_head(a: Architecture) -> float:
    """The head's parameters, which every step reads, over a layer's."""
    attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    mlps = (1, a.intermediate_size) if a.experts is None else (a.experts.num_experts, a.experts.intermediate_size)
    return a.vocab_size * a.hidden_size / (attention + 3 * a.hidden_size * mlps[0] * mlps[1])


def check_stages(a: Architecture, num_stages: int) -> None:
    """Raises InvalidConfigurationError, naming the numbers that fit, when the layers cannot be split so."""
    if num_stages == 1:
        return
    if a.bidirectional:
        raise InvalidConfigurationError(f"--pipeline-parallel-size {num_stages}: encoders ({a.name}) run on one device")
    if a.generic:
        raise InvalidConfigurationError(
            f"--pipeline-parallel-size {num_stages}: {a.name} is computed by transformers' modules, which run on one "
            "device"
        )
    if num_stages > a.num_layers:
        raise InvalidConfigurationError(
            f"--pipeline-parallel-size {num_stages}: the model has {a.num_layers} layers, and every stage needs one; "
            f"these fit: {'1' if a.num_layers == 1 else f'1 to {a.num_layers}'}"
        )


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
        not a.generic and not a.bidirectional and kv and a.num_heads % size == 0 and all(w % size == 0 for w in widths)
    )
