"""Numbers that API processes share: one row of float64 cells for each process, in a file that all of them map.

    row 0 (leader)    [ cell 0 | cell 1 | … ]      every process writes its own row only and may read them
    row 1             [ cell 0 | cell 1 | … ]      all: nothing is locked, and a sum over rows is what all did together

Cells are given out in order, so processes that ask for the same ones in the same order mean the same cells. With one
process it is plain memory. (An aligned eight-byte write is seen whole by the other processes on every CPU we run on.)
"""

from __future__ import annotations

import mmap
from pathlib import Path

CELLS = 8192
"""For each process: more than all metrics take (vocabularies of labels are fixed)."""
_BYTES = 8


class Cells:
    def __init__(self, *, num_rows: int = 1, row: int = 0, path: Path | None = None) -> None:
        """path: the shared file, made large enough by whoever comes first. None: memory of this process alone."""
        self.num_rows, self.row = num_rows, row
        size = num_rows * CELLS * _BYTES
        if path is None:
            self._all = memoryview(bytearray(size)).cast("d")
        else:
            with path.open("a+b") as file:
                file.truncate(size)
                self._all = memoryview(mmap.mmap(file.fileno(), size)).cast("d")
        self.own = self._all[row * CELLS : (row + 1) * CELLS]
        """This process's row, to write to."""
        self._next = 0

    def allocate(self, count: int = 1) -> int:
        """The first of so many cells."""
        first, self._next = self._next, self._next + count
        if self._next > CELLS:
            raise ValueError(f"more than {CELLS} cells are wanted")
        return first

    def at(self, row: int, cell: int) -> float:
        return self._all[row * CELLS + cell]

    def total(self, cell: int) -> float:
        """Over all processes."""
        return sum(self._all[cell::CELLS])
