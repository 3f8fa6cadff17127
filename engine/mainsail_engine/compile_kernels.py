"""A model's kernels compiled ahead: `mainsail-engine compile-kernels`, and beside the reading of weights.

    config.json ─▶ the model, without memory ─▶ its steps ─▶ launches, noted ─▶ compiled on all cores ─▶ Triton's cache

Needs no card and no weights, so an image's build can do it for the models and cards that it will meet: a start from
that image compiles nothing (what $MAINSAIL_KERNELS has is linked into the cache, which may be a pod's own and empty). A
start that finds no mark of it in the cache does the same in a process of its own, while the core imports torch and
reads weights.

Nothing depends on it: what is missing is compiled when it is first launched, later and one after another. Imports no
torch until it compiles.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import types
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from mainsail_engine.child import start_child, take_orders
from mainsail_engine.config import EngineConfig
from mainsail_engine.cuda_driver import CardName, installed_card
from mainsail_engine.errors import InvalidConfigurationError, UnsupportedModelError

log = logging.getLogger(__name__)


CARDS = {
    "h100": CardName("NVIDIA H100 80GB HBM3", 132, (9, 0)),
    "h200": CardName("NVIDIA H200", 132, (9, 0)),
    "a100": CardName("NVIDIA A100-SXM4-80GB", 108, (8, 0)),
    "l40s": CardName("NVIDIA L40S", 142, (8, 9)),
    "l4": CardName("NVIDIA L4", 58, (8, 9)),
    "a10": CardName("NVIDIA A10", 72, (8, 6)),
}
"""--card: as the driver describes them."""
PATIENCE_S = 300.0
"""How long a start waits for the process that compiles for it."""
UNABLE = (OSError, RuntimeError, ValueError)
"""What a folder, a home, a process or a config.json that cannot be had or read raises."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The one line of JSON on the process's standard input."""

    config: EngineConfig
    card: CardName
    mark: str
    """The file that says it was done."""


class Compilation:
    """A process that compiles for a start, or nothing at all."""

    def __init__(self, process: subprocess.Popen[bytes] | None = None) -> None:
        self._process = process

    def wait(self) -> None:
        """Until it is done, however it ended: what is missing then is compiled when it is launched."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            status = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        with suppress(BrokenPipeError):
            process.__exit__(None, None, None)
        if status:
            log.warning("kernels were not all compiled ahead: the process that does it ended with %d", status)


def begin(config: EngineConfig) -> Compilation:
    """Compile what a runner of this configuration will launch on this machine's card, if that was not done before.

    Of several ranks each compiles what the image has not. Where there is no cache, or no process to be had, nothing is.
    """
    if config.device == "cpu":
        return Compilation()
    link_shipped()
    card = installed_card() if config.num_ranks == 1 else None
    try:
        return Compilation() if card is None else _begin(config, card)
    except UNABLE as error:
        log.warning("kernels: not compiled ahead: %s", error)
        return Compilation()


def _begin(config: EngineConfig, card: CardName) -> Compilation:
    mark = mark_of(config, card)
    if mark.exists():
        return Compilation()
    log.info("kernels: compiling ahead for %s", card.name)
    order = Order(config=config, card=card, mark=str(mark))
    return Compilation(start_child("mainsail_engine.compile_kernels", order, CUDA_VISIBLE_DEVICES=""))


def link_shipped() -> None:
    """What the image has of compiled kernels, where Triton looks for them; what is there already stays, but for links
    to what is no more: an earlier image's, in a cache that outlived it. Without a cache to write to, nothing."""
    try:
        cache, shipped = cache_folder(), Path(os.environ.get("MAINSAIL_KERNELS") or os.devnull)
        for entry in cache.iterdir() if cache.is_dir() else ():
            if entry.is_symlink() and not entry.exists():
                entry.unlink(missing_ok=True)
        if shipped.is_dir() and shipped.resolve() != cache.resolve():
            _link_all(shipped, cache)
    except UNABLE as error:
        log.warning("kernels: those of the image are not used: %s", error)


def _link_all(shipped: Path, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for entry in shipped.iterdir():
        with suppress(FileExistsError):
            (cache / entry.name).symlink_to(entry.resolve())


def mark_of(config: EngineConfig, card: CardName) -> Path:
    """The file in Triton's cache that says all was compiled for this: its name has everything that it depends on.

    Raises OSError or ValueError where the model's description cannot be read.
    """
    digest = hashlib.sha256()
    for value in (card, _shapes(config), [_version(name) for name in ("torch", "triton")], sys.version):
        digest.update(msgspec.json.encode(value))
    for room in ("mainsail_kernels", "mainsail_engine/model", "mainsail_engine/runner", "mainsail_engine/sampling"):
        for source in sorted(_root(room).rglob("*.py")):
            digest.update(source.read_bytes())
    return cache_folder() / f"mainsail-{digest.hexdigest()[:32]}"


def cache_folder() -> Path:
    """Triton's. Raises RuntimeError for a user without a home."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def _root(room: str) -> Path:
    package, _, rest = room.partition("/")
    if package == "mainsail_engine":
        return Path(__file__).parent / rest
    from importlib.util import find_spec

    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else Path(__file__).parent / "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _shapes(config: EngineConfig) -> list[Any]:
    """Of a configuration, what decides which kernels are launched."""
    model, path = config.model, Path(config.model.path)
    described = path / "config.json" if path.is_dir() else path
    stat = described.stat()
    content = described.read_text() if path.is_dir() else f"{path} {stat.st_size} {stat.st_mtime_ns}"
    adapters = (config.lora.max_loras, config.lora.max_lora_rank) if config.lora else None
    return [
        content, model.dtype, model.quantization, model.max_model_len, config.cache.dtype, config.scheduler,
        config.speculative, config.tensor_parallel_size, adapters,
    ]  # fmt: skip


def compile_ahead(config: EngineConfig, card: CardName, *, jobs: int | None = None) -> bool:
    """Here and now. False: not all of it. Raises UnsupportedModelError, InvalidConfigurationError.

    jobs: processes; None: one for each CPU that there is to use.
    """
    _spare_dynamo()
    from mainsail_engine.runner.dry_run import launches_of
    from mainsail_engine.runner.threads import usable_cpus
    from mainsail_kernels._triton import Card
    from mainsail_kernels.ahead import compile_all

    launches = launches_of(config, Card(card.name, card.multiprocessors, card.capability))
    done = compile_all(launches, jobs or usable_cpus())
    for name, why in done.failed.items():
        log.warning("kernels: %s could not be compiled: %s", name, why)
    log.info("kernels: %d compiled for %s in %.1f s", done.num_kernels, card.name, done.seconds)
    return not done.failed


def _spare_dynamo() -> None:
    """Shape functions of torch's ask its compiler to leave them alone, and import it for that: seconds, for nothing."""
    stub: Any = types.ModuleType("torch._dynamo")
    stub.disable = lambda function, *_, **__: function  # pyright: ignore[reportUnknownLambdaType]
    sys.modules.setdefault("torch._dynamo", stub)


def card_named(name: str | None) -> CardName:
    """--card. Raises InvalidConfigurationError."""
    card = CARDS.get(name.lower()) if name else installed_card()
    if card is None:
        missing = f"there is no card named {name!r}" if name else "this machine has no card"
        raise InvalidConfigurationError(f"--card: {missing}; give one of {', '.join(CARDS)}")
    return card


def leave_mark(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main() -> None:
    """For a start, whose weights come first: see `begin`."""
    order = take_orders(Order)
    os.nice(10)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s kernels: %(message)s", stream=sys.stderr)
    try:
        if compile_ahead(order.config, order.card):
            leave_mark(Path(order.mark))
    except UnsupportedModelError as error:
        log.info("kernels: not compiled ahead: %s", error.message)
        leave_mark(Path(order.mark))


if __name__ == "__main__":
    main()
