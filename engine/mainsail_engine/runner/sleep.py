"""A model's tensors to the host and back: what /sleep and /wake_up do to weights.

Tensors are found where a model keeps them (attributes, lists, dictionaries and dataclasses of the engine and its
kernels, torch's modules, at any depth) and replaced one by one, so that the device never holds two copies of more than
one. What was one tensor (a head tied to the embedding) stays one. What ranks share with one another stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch

from mainsail_engine.model.parallel import Parallel

Move = Callable[[torch.Tensor], torch.Tensor]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu")


def to_device(device: torch.device) -> Move:
    return lambda tensor: tensor.to(device)


def move_tensors(thing: Any, move: Move) -> int:
    """Replace every tensor below `thing`. Returns the number of bytes moved."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for place in _places(thing, set()):
        held = place.get()
        if id(held) not in moved:
            moved[id(held)] = (held, move(held))
        place.put(moved[id(held)][1])
    return sum(new.nbytes for _, new in moved.values())


class _Place:
    """Somewhere that a tensor is kept."""

    def __init__(self, owner: Any, key: Any, *, item: bool) -> None:
        self._owner, self._key, self._item = owner, key, item

    def get(self) -> torch.Tensor:
        return self._owner[self._key] if self._item else getattr(self._owner, self._key)

    def put(self, tensor: torch.Tensor) -> None:
        if self._item:
            self._owner[self._key] = tensor
        else:
            object.__setattr__(self._owner, self._key, tensor)


def _places(thing: Any, seen: set[int]) -> Iterator[_Place]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    for key, value, item in _parts(thing):
        if isinstance(value, torch.Tensor):
            yield _Place(thing, key, item=item)
        else:
            yield from _places(value, seen)


def _parts(thing: Any) -> list[tuple[Any, Any, bool]]:
    """(key, value, whether it is an item and not an attribute) of what may hold tensors."""
    if isinstance(thing, Parallel):
        return []
    if isinstance(thing, list):
        return [(index, value, True) for index, value in enumerate(cast("list[Any]", thing))]
    if isinstance(thing, dict):
        return [(key, value, True) for key, value in cast("dict[Any, Any]", thing).items()]
    if isinstance(thing, torch.nn.Module):
        held = ("_parameters", "_buffers", "_modules")
        return [(name, getattr(thing, name), False) for name in held]
    if not type(thing).__module__.startswith(("mainsail_engine", "mainsail_kernels")):
        return []
    if is_dataclass(thing):
        return [(f.name, getattr(thing, f.name), False) for f in fields(thing)]
    attributes = cast("dict[str, Any]", getattr(thing, "__dict__", {}))
    return [(name, value, False) for name, value in attributes.items()]
