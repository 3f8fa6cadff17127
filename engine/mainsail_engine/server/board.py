"""What the API processes of one server tell one another, through shared cells.

Each counts its own requests; the sums decide about admission, drain and liveness. The leader (process 0, which owns the
core, the health port and the signals) raises the flag to drain for all. Any process may put the engine to sleep and
wake it up: it sleeps while more went one way than the other.
"""

from __future__ import annotations

from mainsail_engine.cells import Cells


class Board:
    def __init__(self, cells: Cells | None = None) -> None:
        self.cells = cells or Cells()
        names = (
            "queued_requests", "queued_tokens", "drain_rate", "in_progress", "running", "working_since", "serving",
            "draining", "slept", "woken",
        )  # fmt: skip
        self._at = {name: self.cells.allocate() for name in names}

    def set(self, name: str, value: float) -> None:
        """This process's number."""
        self.cells.own[self._at[name]] = value

    def total(self, name: str) -> float:
        """Over all processes."""
        return self.cells.total(self._at[name])

    def add(self, name: str) -> None:
        """One more in this process's number."""
        self.cells.own[self._at[name]] += 1

    @property
    def is_asleep(self) -> bool:
        return self.total("slept") > self.total("woken")

    def others(self, name: str) -> float:
        """Over all processes but this one."""
        return self.cells.total(self._at[name]) - self.cells.own[self._at[name]]

    def raised(self, name: str) -> bool:
        """Whether any process has raised the flag."""
        return self.total(name) > 0

    def working_since_s(self) -> float | None:
        """Monotonic time since when the process with the oldest work has had some. None: nobody has."""
        running, since = self._at["running"], self._at["working_since"]
        rows = range(self.cells.num_rows)
        return min((self.cells.at(row, since) for row in rows if self.cells.at(row, running) > 0), default=None)
