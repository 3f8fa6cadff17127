"""From a checkpoint's tensors to the model's parameters: every tensor there and used, or an error with its name.

`Weights` hands a source's tensors to the model, which asks for each by name; what was asked for and is missing, or is
there and was never asked for, ends the start. Without a source the weights are dummies: random, from the shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mainsail_engine.errors import MissingTensorError, UnexpectedTensorError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.sources import ALL, Source, open_source


class Part(NamedTuple):
    """What is wanted of a checkpoint's tensor: its name, its whole shape, and the rows and columns of it."""

    name: str
    shape: tuple[int, ...]
    rows: slice = ALL
    columns: slice = ALL

    @property
    def part_shape(self) -> tuple[int, ...]:
        cuts = (self.rows, self.columns)
        return tuple(len(range(*cut.indices(n))) for n, cut in zip(self.shape, cuts, strict=False)) + self.shape[2:]


class Weights:
    """What a model asks for its parameters. Each lands once on the device, in the model's dtype."""

    def __init__(self, source: Source | None, device: torch.device, dtype: torch.dtype) -> None:
        """source None: dummy weights."""
        self._source = source
        self._asked: set[str] = set()
        self.device = device
        self.dtype = dtype
        self._random = torch.Generator(device=device).manual_seed(0)

    def has(self, name: str) -> bool:
        return self._source is not None and name in self._source.names

    def get(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL,
        *, dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """That part of the parameter of that name and (whole) shape. MissingTensorError if it is not there, or has
        another shape."""
        return self.fused([Part(name, shape, rows, columns)], dtype=dtype)

    def fused(self, parts: Sequence[Part], *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Parts of tensors, one below the other, as one parameter."""
        out = self._empty((sum(part.part_shape[0] for part in parts), *parts[0].part_shape[1:]), dtype)
        self._fill_rows(out, parts)
        return out

    def stacked(self, stack: Sequence[Sequence[Part]]) -> torch.Tensor:
        """One `fused` parameter for each member of the stack (each expert), in a new first dimension."""
        rows = sum(part.part_shape[0] for part in stack[0])
        out = self._empty((len(stack), rows, *stack[0][0].part_shape[1:]), None)
        for member, parts in zip(out, stack, strict=True):
            self._fill_rows(member, parts)
        return out

    def _fill_rows(self, out: torch.Tensor, parts: Sequence[Part]) -> None:
        """Each part in its rows of out, one below the other."""
        first = 0
        for part in parts:
            count = part.part_shape[0]
            self._fill(out[first : first + count], part)
            first += count

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _fill(self, out: torch.Tensor, part: Part) -> None:
        if self._source is not None:
            out.copy_(self._checked(self._source, part))
        elif out.dim() == 1 and part.name.endswith("norm.weight"):
            out.fill_(1.0)
        else:
            out.normal_(0.0, 0.02, generator=self._random)

    def _checked(self, source: Source, part: Part) -> torch.Tensor:
        self._asked.add(part.name)
        if part.name not in source.names:
            raise MissingTensorError(f"{source.described} has no tensor {part.name}, which the architecture needs")
        shape = source.shape(part.name)
        if shape != part.shape:
            raise MissingTensorError(
                f"{source.described}: {part.name} has shape {list(shape)}, "
                f"the configuration asks for {list(part.shape)}"
            )
        return source.tensor(part.name, part.rows, part.columns)

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """Raises UnexpectedTensorError if the checkpoint holds tensors that nobody asked for (but the ignored ones)."""
        if self._source is None:
            return
        left = sorted(self._source.names - self._asked - ignored)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UnexpectedTensorError(
                f"{self._source.described} has tensors that the architecture does not: {', '.join(left[:3])}{more}"
            )


def open_weights(
    path: Path, architecture: Architecture, *, dummy: bool, device: torch.device, dtype: torch.dtype
) -> Weights:
    """The weights at a path that read_architecture took."""
    return Weights(None if dummy else open_source(path, architecture), device, dtype)
