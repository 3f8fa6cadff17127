"""Which LoRA adapters there are, in which slots of the device, and who uses them.

A name is served from the moment that its adapter is read until it is unloaded; requests that go through it then finish
with it. There may be more adapters (--max-cpu-loras, in host memory) than slots on the device (--max-loras): a request
whose adapter has none takes, as it is about to start, a free slot or that of the adapter which nothing runs through and
which was used longest ago. Where something runs through each, the adapter with the fewest running requests gets no new
ones until its slot can be taken, so that no adapter waits for ever.
 An adapter that is loaded again, under the same name or
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
    number: int
    """Counts the adapters of this engine: no two have the same."""
    slot: int = -1
    """On the device; -1: it is in host memory alone."""
    adapter: Adapter | None = None
    """None: it is being read."""
    last_used: int = 0
    """The number of starts of requests when one went through it last."""
    users: dict[str, Request] = field(default_factory=dict[str, Request])
    """Requests that go through it, by id."""

    @property
    def num_running(self) -> int:
        return sum(request.status is RequestStatus.RUNNING for request in self.users.values())

    @property
    def salt(self) -> str:
        """What keeps its KV apart in the prefix cache."""
        return f"\0adapter {self.number}"


class AdapterTable:
    def __init__(self, num_slots: int, max_adapters: int | None = None) -> None:
        """max_adapters: in slots and in host memory alone; None: no more than slots."""
        self._slots: list[Loaded | None] = [None] * num_slots
        self._max_adapters = max_adapters or num_slots
        self._all: list[Loaded] = []
        """Those that have a name, or are used still."""
        self._num_starts = 0
        self._leaving: tuple[Loaded, Request] | None = None
        """An adapter that is to give up its slot, and the request that waits for it."""
        self._named: dict[str, Loaded] = {}
        self._of_request: dict[str, Loaded] = {}
        self._count = 0

    @property
    def paths(self) -> dict[str, str]:
        """Served name → path."""
        return {name: loaded.path for name, loaded in self._named.items() if loaded.adapter is not None}

    def reserve(self, name: str, path: str) -> Loaded:
        """A place for an adapter that is about to be read. Raises InvalidAdapterError."""
        if name in self._named:
            raise InvalidAdapterError(f"there is an adapter {name!r} already: unload it first, or choose another name")
        if len(self._all) >= self._max_adapters:
            raise InvalidAdapterError(
                f"there are {len(self._all)} adapters already, and no place for more: unload one, or start with more "
                "--max-loras (on the device) or --max-cpu-loras (in host memory)"
            )
        self._count += 1
        loaded = self._named[name] = Loaded(name, path, self._count)
        self._all.append(loaded)
        return loaded

    def forget(self, name: str) -> None:
        """No request may ask for it any more. Raises InvalidAdapterError for a name that nothing has."""
        if name not in self.paths:
            raise InvalidAdapterError(f"there is no adapter {name!r}; loaded: {', '.join(self.paths) or 'none'}")
        self._free_if_unused(self._named.pop(name))

    def cancel(self, loaded: Loaded) -> None:
        """What was reserved could not be read."""
        del self._named[loaded.name]
        self._all.remove(loaded)

    def use(self, name: str, request: Request) -> Loaded | None:
        """From now until `release`, this request goes through the adapter of that name, and through no other. None:
        there is none."""
        self.release((request.request_id,))
        loaded = self._named.get(name)
        if loaded is None or loaded.adapter is None:
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
        used = [loaded for loaded in self._all if loaded.users] if self._of_request else []
        return AdapterUse(_having(used, RequestStatus.RUNNING), _having(used, RequestStatus.WAITING))

    def _free_if_unused(self, loaded: Loaded) -> None:
        if not loaded.users and self._named.get(loaded.name) is not loaded:
            self._all.remove(loaded)
            if loaded.slot >= 0:
                self._slots[loaded.slot] = None

    # -- slots -----------------------------------------------------------------------------------------------------

    def of(self, request: Request) -> Loaded | None:
        """The adapter that the request goes through. None: none."""
        return self._of_request.get(request.request_id)

    def free_slot(self) -> int | None:
        return next((slot for slot, loaded in enumerate(self._slots) if loaded is None), None)

    def give(self, loaded: Loaded, slot: int) -> None:
        """The slot is that adapter's from now on; another that had it is in host memory alone."""
        before = self._slots[slot]
        if before is not None:
            before.slot = -1
        if self._leaving is not None and self._leaving[0] is before:
            self._leaving = None
        self._slots[slot], loaded.slot = loaded, slot

    def slot_for(self, request: Request, loaded: Loaded) -> int | None:
        """Where the request's adapter, which has no slot, may go now. None: the request must wait."""
        free = self.free_slot()
        if free is not None:
            return free
        held = [each for each in self._slots if each is not None]
        idle = [each for each in held if not each.num_running]
        if idle:
            return min(idle, key=lambda each: each.last_used).slot
        if self._leaver() is None:
            self._leaving = min(held, key=lambda each: (each.num_running, each.last_used)), request
        return None

    def may_start(self, loaded: Loaded) -> bool:
        """Whether requests may begin to go through it: not while another waits for its slot."""
        return loaded is not self._leaver()

    def started(self, loaded: Loaded) -> None:
        self._num_starts += 1
        loaded.last_used = self._num_starts

    def _leaver(self) -> Loaded | None:
        if self._leaving is None:
            return None
        loaded, request = self._leaving
        if request.request_id not in self._of_request or request.status is not RequestStatus.WAITING:
            self._leaving = None  # nobody waits for it any more
            return None
        return loaded


def _having(used: Iterable[Loaded], status: RequestStatus) -> list[str]:
    return sorted({loaded.name for loaded in used if any(r.status is status for r in loaded.users.values())})


class AdapterDesk:
    """Loads and unloads beside running steps: reads on a thread, fills between two steps."""

    def __init__(self, num_slots: int, runner: AdapterRunner, max_adapters: int | None = None) -> None:
        """max_adapters: in slots and in host memory alone; None: no more than slots."""
        self.table = AdapterTable(num_slots, max_adapters)
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

    def place(self, request: Request) -> bool:
        """Give a request that is about to start its adapter's slot. False: there is none for it yet, and it must wait.

        Called between two steps: whatever runs through the adapter that was in the slot has finished.
        """
        loaded = self.table.of(request)
        if loaded is None or loaded.adapter is None:
            return True
        if not self.table.may_start(loaded):
            return False
        if loaded.slot < 0:
            slot = self.table.slot_for(request, loaded)
            if slot is None:
                return False
            self._move_in(loaded, slot, loaded.adapter)
        self.table.started(loaded)
        request.adapter_slot = loaded.slot
        return True

    def _move_in(self, loaded: Loaded, slot: int, adapter: Adapter) -> None:
        self._runner.fill_adapter(slot, adapter, loaded.name, loaded.path)
        self.table.give(loaded, slot)

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
        free = self.table.free_slot()
        if free is not None:
            self._move_in(loaded, free, adapter)
        loaded.adapter = adapter
        log.info("adapter %s is served from %s (rank %d)", loaded.name, loaded.path, adapter.rank)

    def _answer(self, control_id: str) -> None:
        self._answers += [Adapters(self.table.paths), Controlled(control_id)]
