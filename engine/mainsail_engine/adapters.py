"""Which LoRA adapters there are, in which slots of the device, and who uses them.

A name is served from the moment that its slot is filled until it is unloaded. Requests that go through an adapter then
finish with it: its slot is free once the last of them is gone. An adapter that is loaded again, under the same name or
another, is another one to the prefix cache: KV that one made is never read by the next.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mainsail_engine.errors import InvalidAdapterError
from mainsail_engine.protocol import Adapters, AdapterUse, Controlled, LoadAdapter, UnloadAdapter
from mainsail_engine.request import Request, RequestStatus

if TYPE_CHECKING:
    from mainsail_engine.model.lora import Adapter

log = logging.getLogger(__name__)


class AdapterRunner(Protocol):
    """What loading needs of a model runner."""

    def read_adapter(self, name: str, path: str) -> Adapter:
        """From the disk, checked; may be called beside a running step. Raises InvalidAdapterError."""
        ...

    def fill_adapter(self, slot: int, adapter: Adapter, name: str, path: str) -> None:
        """Put it where no request of a later step looks yet; called between two steps."""
        ...


@dataclass(slots=True, eq=False)
class Loaded:
    name: str
    path: str
    slot: int
    number: int
    """Counts the adapters of this engine: no two have the same."""
    users: dict[str, Request] = field(default_factory=dict[str, Request])
    """Requests that go through it, by id."""
    ready: bool = False
    """Its slot is filled."""

    @property
    def salt(self) -> str:
        """What keeps its KV apart in the prefix cache."""
        return f"\0adapter {self.number}"


class AdapterTable:
    def __init__(self, num_slots: int) -> None:
        self._slots: list[Loaded | None] = [None] * num_slots
        self._named: dict[str, Loaded] = {}
        self._of_request: dict[str, Loaded] = {}
        self._count = 0

    @property
    def paths(self) -> dict[str, str]:
        """Served name → path."""
        return {name: loaded.path for name, loaded in self._named.items() if loaded.ready}

    def reserve(self, name: str, path: str) -> Loaded:
        """A slot for an adapter that is about to be read. Raises InvalidAdapterError."""
        if name in self._named:
            raise InvalidAdapterError(f"there is an adapter {name!r} already: unload it first, or choose another name")
        free = next((slot for slot, loaded in enumerate(self._slots) if loaded is None), None)
        if free is None:
            raise InvalidAdapterError(
                f"all {len(self._slots)} slots for adapters are in use: unload one, or start with more --max-loras"
            )
        self._count += 1
        loaded = self._slots[free] = self._named[name] = Loaded(name, path, free, self._count)
        return loaded

    def forget(self, name: str) -> None:
        """No request may ask for it any more. Raises InvalidAdapterError for a name that nothing has."""
        if name not in self.paths:
            raise InvalidAdapterError(f"there is no adapter {name!r}; loaded: {', '.join(self.paths) or 'none'}")
        self._free_if_unused(self._named.pop(name))

    def cancel(self, loaded: Loaded) -> None:
        """What was reserved could not be read."""
        del self._named[loaded.name]
        self._slots[loaded.slot] = None

    def use(self, name: str, request: Request) -> Loaded | None:
        """From now until `release`, this request goes through the adapter of that name. None: there is none."""
        loaded = self._named.get(name)
        if loaded is None or not loaded.ready:
            return None
        loaded.users[request.request_id] = request
        self._of_request[request.request_id] = loaded
        return loaded

    def release(self, request_ids: Iterable[str]) -> None:
        """These requests are gone (ids of requests without an adapter may be among them)."""
        for request_id in request_ids if self._of_request else ():
            loaded = self._of_request.pop(request_id, None)
            if loaded is not None:
                loaded.users.pop(request_id, None)
                self._free_if_unused(loaded)

    def in_use(self) -> AdapterUse:
        """By what state the requests are in that go through them."""
        used = [loaded for loaded in self._slots if loaded is not None and loaded.users] if self._of_request else []
        return AdapterUse(_having(used, RequestStatus.RUNNING), _having(used, RequestStatus.WAITING))

    def _free_if_unused(self, loaded: Loaded) -> None:
        if not loaded.users and self._named.get(loaded.name) is not loaded:
            self._slots[loaded.slot] = None


def _having(used: Iterable[Loaded], status: RequestStatus) -> list[str]:
    return sorted({loaded.name for loaded in used if any(r.status is status for r in loaded.users.values())})


class AdapterDesk:
    """Loads and unloads beside running steps: reads on a thread, fills between two steps."""

    def __init__(self, num_slots: int, runner: AdapterRunner) -> None:
        self.table = AdapterTable(num_slots)
        self._runner = runner
        self._read: queue.SimpleQueue[tuple[str, Loaded, Adapter | Exception]] = queue.SimpleQueue()
        self._answers: list[Adapters | Controlled] = []
        self._told_use = AdapterUse()
        self._num_reading = 0

    @property
    def is_busy(self) -> bool:
        """Something is being read, or waits to be told."""
        return self._num_reading > 0 or bool(self._answers)

    def load_now(self, modules: Iterable[tuple[str, str]]) -> None:
        """At the start. Raises InvalidAdapterError."""
        for name, path in modules:
            self._fill(self.table.reserve(name, path), self._runner.read_adapter(name, path))

    def handle(self, command: LoadAdapter | UnloadAdapter) -> None:
        try:
            if isinstance(command, LoadAdapter):
                self._begin(command)
            else:
                self.table.forget(command.name)
                self._answer(command.control_id)
        except InvalidAdapterError as error:
            self._answers.append(Controlled(command.control_id, error.message))

    def news_of_use(self) -> AdapterUse | None:
        """Which adapters run and wait, where that has changed since this was asked last."""
        use = self.table.in_use()
        if use == self._told_use:
            return None
        self._told_use = use
        return use

    def take_answers(self) -> list[Adapters | Controlled]:
        """Fill what has been read, and tell. Call it between two steps."""
        while not self._read.empty():
            self._finish(*self._read.get())
        answers, self._answers = self._answers, []
        return answers

    def _begin(self, command: LoadAdapter) -> None:
        loaded = self.table.reserve(command.name, command.path)
        self._num_reading += 1

        def read() -> None:
            try:
                what: Adapter | Exception = self._runner.read_adapter(command.name, command.path)
            except Exception as error:
                what = error
            self._read.put((command.control_id, loaded, what))

        threading.Thread(target=read, name="adapter", daemon=True).start()

    def _finish(self, control_id: str, loaded: Loaded, what: Adapter | Exception) -> None:
        self._num_reading -= 1
        if isinstance(what, Exception):
            self.table.cancel(loaded)
            if not isinstance(what, InvalidAdapterError):
                log.error("adapter %s could not be read", loaded.name, exc_info=what)
            self._answers.append(Controlled(control_id, str(what)))
            return
        self._fill(loaded, what)
        self._answer(control_id)

    def _fill(self, loaded: Loaded, adapter: Adapter) -> None:
        self._runner.fill_adapter(loaded.slot, adapter, loaded.name, loaded.path)
        loaded.ready = True
        log.info("adapter %s is served from %s (rank %d)", loaded.name, loaded.path, adapter.rank)

    def _answer(self, control_id: str) -> None:
        self._answers += [Adapters(self.table.paths), Controlled(control_id)]
