"""Adapters in few slots of the device: who gets one, who gives one up, and that nobody waits for ever."""

from __future__ import annotations

import time

import pytest
from tests.engine.test_core import CONFIG, EOS, NamingRunner, drive

from mainsail_engine.adapters import AdapterDesk
from mainsail_engine.config import EngineConfig, LoraConfig, ModelConfig
from mainsail_engine.core import ASLEEP, EngineCore
from mainsail_engine.errors import InvalidAdapterError, InvalidConfigurationError
from mainsail_engine.model.lora import Adapter
from mainsail_engine.protocol import Adapters, Add, Control, Controlled, LoadAdapter, UnloadAdapter
from mainsail_engine.request import Request, RequestStatus, SamplingParams
from mainsail_engine.scheduler import Scheduler


class Slots:
    """AdapterRunner over a list: which adapter is in which slot."""

    def __init__(self, count: int) -> None:
        self.names = [""] * count
        self.num_fills = 0

    def read_adapter(self, name: str, path: str) -> Adapter:
        del name, path
        return Adapter(4, {})

    def fill_adapter(self, slot: int, adapter: Adapter, name: str, path: str) -> None:
        del adapter, path
        self.names[slot] = name
        self.num_fills += 1


class House:
    """A desk with some adapters, and requests that start and end."""

    def __init__(self, names: str, slots: int) -> None:
        self.slots = Slots(slots)
        self.desk = AdapterDesk(slots, self.slots, len(names))
        self.desk.load_now((name, "/") for name in names)
        self.count = 0

    def arrive(self, name: str) -> Request:
        self.count += 1
        request = Request(str(self.count), [1], SamplingParams(max_tokens=1), 0.0)
        assert self.desk.table.use(name, request) is not None
        return request

    def try_start(self, request: Request) -> bool:
        if not self.desk.place(request):
            return False
        loaded = self.desk.table.of(request)
        assert loaded is not None
        assert self.slots.names[request.adapter_slot] == loaded.name
        request.status = RequestStatus.RUNNING
        return True

    def start(self, name: str) -> Request:
        request = self.arrive(name)
        assert self.try_start(request)
        return request

    def end(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED
        self.desk.table.release([request.request_id])


def test_the_one_used_longest_ago_gives_its_slot_up() -> None:
    house = House("abc", 2)
    assert house.slots.names == ["a", "b"]
    for name in "ab":
        house.end(house.start(name))
    house.end(house.start("a"))
    house.end(house.start("c"))
    assert house.slots.names == ["a", "c"]
    fills = house.slots.num_fills
    for name in "acac":
        house.end(house.start(name))
    assert house.slots.num_fills == fills
    house.end(house.start("b"))
    assert house.slots.names == ["b", "c"]


def test_a_slot_that_something_runs_through_is_not_taken() -> None:
    house = House("abc", 2)
    one, two = house.start("a"), house.start("b")
    third = house.arrive("c")
    assert not house.try_start(third)
    house.end(two)
    assert house.try_start(third)
    assert house.slots.names == ["a", "c"]
    assert house.slots.names[one.adapter_slot] == "a"


def test_nobody_waits_for_ever() -> None:
    """Requests of a and b keep coming and overlap; c gets the slot of the one with fewer of them."""
    house = House("abc", 2)
    running = [house.start("a"), house.start("a"), house.start("b")]
    third = house.arrive("c")
    assert not house.try_start(third)
    assert house.try_start(house.arrive("a"))
    late = house.arrive("b")
    assert not house.try_start(late), "b is to leave"
    house.end(running[2])
    assert not house.try_start(late)
    assert house.try_start(third)
    assert not house.try_start(late), "both slots are in use again"
    house.end(third)
    assert house.try_start(late)


def test_a_waiting_request_that_is_gone_holds_nobody_up() -> None:
    house = House("abc", 2)
    house.start("a")
    house.start("b")
    third = house.arrive("c")
    assert not house.try_start(third)
    house.end(third)
    assert house.try_start(house.arrive("a"))
    assert house.try_start(house.arrive("b"))


def test_a_request_that_was_preempted_finds_its_adapter_again() -> None:
    house = House("abc", 1)
    first = house.start("a")
    first.status = RequestStatus.WAITING
    second = house.start("b")
    assert house.slots.names == ["b"]
    assert not house.try_start(first)
    house.end(second)
    assert house.try_start(first)
    assert house.slots.names == ["a"]


def test_no_more_than_there_are_places_for() -> None:
    house = House("abc", 2)
    with pytest.raises(InvalidAdapterError, match=r"3 adapters already.*--max-cpu-loras"):
        house.desk.table.reserve("d", "/")
    busy = house.start("b")
    house.desk.table.forget("b")
    with pytest.raises(InvalidAdapterError, match="3 adapters already"):
        house.desk.table.reserve("d", "/")
    house.end(busy)
    house.desk.table.reserve("d", "/")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="--max-cpu-loras must be at least --max-loras"):
        LoraConfig(max_loras=4, max_cpu_loras=2)
    with pytest.raises(InvalidConfigurationError, match="works on one device"):
        EngineConfig(model=ModelConfig(path="m"), lora=LoraConfig(max_loras=2, max_cpu_loras=4), tensor_parallel_size=2)


def test_a_request_that_comes_again_holds_the_adapter_of_its_second_coming_alone() -> None:
    """It waited for its grammar, and the name was given to another adapter meanwhile: the first has nobody left."""
    slots = Slots(2)
    desk = AdapterDesk(2, slots, 2)
    desk.load_now([("a", "/first")])
    request = Request("1", [1], SamplingParams(max_tokens=1), 0.0)
    desk.table.use("a", request)
    desk.table.forget("a")
    desk.load_now([("a", "/second")])
    desk.table.use("a", request)
    desk.load_now([("b", "/")])
    assert slots.num_fills == 3
    desk.table.release(["1"])
    assert desk.table.paths == {"a": "/second", "b": "/"}


def test_no_clients_salt_reaches_what_went_through_an_adapter() -> None:
    """Nor may what it leaves there be taken for an adapter's: that would spoil the answers of others."""
    house = House("a", 1)
    loaded = house.desk.table.use("a", Request("0", [1], SamplingParams(max_tokens=1), 0.0))
    assert loaded is not None
    core = EngineCore(Scheduler(CONFIG, 16, 64, {EOS}), NamingRunner(), depth=1, adapters=house.desk)
    params, cached = SamplingParams(max_tokens=2, temperature=0.0), dict[str, int]()
    salts = ("", "x", "\0")
    for client in salts:
        for name, salt, adapter in (("base", client + loaded.salt, ""), ("adapted", client, "a")):
            for turn in (1, 2):
                core.handle(Add(f"{client}{name}{turn}", [1] * 33, params, cache_salt=salt, adapter=adapter), 0.0)
                for step in drive(core):
                    cached |= {output.request_id: output.num_cached_tokens for output in step.outputs}
    assert cached == {
        f"{client}{name}{turn}": 32 * (turn - 1) for client in salts for name in ("base", "adapted") for turn in (1, 2)
    }


class Bed:
    """See core.Sleeper: as it lay down, so it gets up."""

    def resting_runner(self) -> NamingRunner:
        return NamingRunner()

    def sleep(self) -> None: ...

    def wake_up(self) -> tuple[Scheduler, NamingRunner]:
        return Scheduler(CONFIG, 16, 64, {EOS}), NamingRunner()


def test_nothing_is_put_into_the_memory_of_an_engine_that_sleeps() -> None:
    house = House("ab", 2)
    house.desk.table.forget("b")
    scheduler, runner = Bed().wake_up()
    core = EngineCore(scheduler, runner, depth=1, adapters=house.desk, sleeper=Bed())
    core.handle(Control("1", "sleep"), 0.0)
    assert core.take_answers() == [Controlled("1")]
    core.handle(LoadAdapter("2", "b", "/"), 0.0)
    core.handle(UnloadAdapter("3", "a"), 0.0)
    assert core.take_answers() == [Controlled("2", ASLEEP), Adapters({}), Controlled("3")]
    assert house.slots.num_fills == 2
    core.handle(Control("4", "wake_up"), 0.0)
    assert core.take_answers() == [Controlled("4")]
    core.handle(LoadAdapter("5", "b", "/"), 0.0)
    while not (answers := core.take_answers()):
        time.sleep(0.001)
    assert answers == [Adapters({"b": "/"}), Controlled("5")]
    assert house.slots.num_fills == 3
