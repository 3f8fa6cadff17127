"""A launcher finds its kernel's variants again, wherever its tensors lie."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from mainsail_kernels import tokens
from mainsail_kernels._triton import Launcher


@dataclass
class Memory:
    """What a launcher asks of a tensor. device -1: the host's."""

    device: int
    address: int = 256

    def get_device(self) -> int:
        return self.device

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Compiles:
    """Triton's side: what was launched the long way, and what of that as it was compiled."""

    compiled: bool = True
    long_way: list[Any] = field(default_factory=list)
    short_way: list[Any] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.long_way.append((grid, arguments, options))
            return Compiled(self) if self.compiled else None

        return launch


@dataclass
class Compiled:
    kernel: Compiles

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.kernel.short_way.append((grid, arguments))


PINNED = Memory(-1)


@pytest.mark.parametrize("tensors", [(PINNED, Memory(0)), (Memory(0), PINNED), (Memory(0), Memory(0))])
def test_what_was_compiled_is_launched_again_with_the_same_arguments(tensors: Any) -> None:
    kernel = Compiles()
    launch = Launcher(kernel, (1024,), num_warps=4)
    launch(3, tensors, 7, 8)
    launch(5, tensors, 9, 10)
    assert kernel.long_way == [((3,), (*tensors, 7, 8, 1024), {"num_warps": 4})]
    assert kernel.short_way == [((5, 1, 1), (*tensors, 9, 10, 1024))]


@pytest.mark.parametrize("other", [(PINNED, Memory(1)), (PINNED, Memory(0, 264)), (Memory(-1, 8), Memory(0))])
def test_other_devices_and_alignments_are_other_variants(other: Any) -> None:
    kernel = Compiles()
    launch, one = Launcher(kernel, ()), cast(Any, (PINNED, Memory(0)))
    for tensors in (one, other, one, other):
        launch(1, tensors)
    assert [arguments for _, arguments, _ in kernel.long_way] == [one, other]
    assert [arguments for _, arguments in kernel.short_way] == [one, other]


@pytest.mark.parametrize(("tensor", "compiled"), [(PINNED, True), (Memory(0), False)])
def test_without_a_card_or_a_compiled_kernel_nothing_is_kept(tensor: Any, compiled: bool) -> None:
    """The interpreter; and ahead.noted, which launches nothing."""
    kernel = Compiles(compiled)
    launch = Launcher(kernel, ())
    launch(1, (tensor,))
    launch(1, (tensor,))
    assert (len(kernel.long_way), kernel.short_way) == (2, [])


@pytest.mark.gpu
def test_a_steps_inputs_come_by_the_short_way(device: torch.device) -> None:
    source = torch.arange(40, dtype=torch.int32).pin_memory()
    packed, tables = torch.zeros(30, dtype=torch.int32).to(device), torch.zeros((5, 4), dtype=torch.int32).to(device)
    for start in (0, 1):
        source += start
        tokens.unpack(source, packed, tables, width=2, decodes=5, gap=0)
        assert packed.tolist() == source[:30].tolist()
        assert tables[:, :2].flatten().tolist() == source[30:].tolist()
    assert tokens._launch_unpack._compiled
