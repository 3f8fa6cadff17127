"""Kernels compiled without a card: all that a runner launches is known beforehand, and a launch then finds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from mainsail_engine import compile_kernels
from mainsail_engine.cli import build_parser, engine_config, main
from mainsail_engine.compile_kernels import CARDS, card_named, mark_of
from mainsail_engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from mainsail_engine.errors import InvalidConfigurationError

MODELS = Path(__file__).parents[2] / "benchmarks/models"
NOTED = """
import json, sys
import msgspec
from mainsail_engine.compile_kernels import CARDS
from mainsail_engine.config import EngineConfig
from mainsail_engine.runner.dry_run import launches_of
from mainsail_kernels._triton import Card

card = Card(*msgspec.structs.astuple(CARDS["h200"]))
names = {}
for line in sys.stdin:
    config = msgspec.json.decode(line, type=EngineConfig)
    names[config.model.path] = [launch.name for launch in launches_of(config, card)]
print(json.dumps(names))
"""
FOUND = """
import json
import torch, triton
from mainsail_kernels._triton import Card
from mainsail_kernels.ahead import compile_all, noted
from mainsail_kernels.tokens import note, resolve

def tensors(count):
    return [torch.empty(17, dtype=torch.int64, device="meta") for _ in range(count)]

with noted(Card("NVIDIA H200", 132, (9, 0))) as launches:
    note(*tensors(3))
    note(*tensors(3))
done = compile_all(launches, 2)
hits = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit))
for launch in (note, resolve):
    try:
        launch(*tensors(3))
    except AttributeError as error:  # there is no driver to launch it with
        assert "_AbsentDriver" in str(error), error
print(json.dumps([len(launches), done.failed, hits]))
"""

FOR_ONE = """
import json, os, signal, time
from dataclasses import replace
import torch
from mainsail_kernels import ahead
from mainsail_kernels._triton import Card
from mainsail_kernels.tokens import note

class Function:
    __name__ = "a_kernel"

    def ASTSource(self, *unused):
        {ACT}

with ahead.noted(Card("NVIDIA H200", 132, (9, 0))) as launches:
    note(*(torch.empty(17, dtype=torch.int64, device="meta") for _ in range(3)))
ahead._build_utilities = lambda: None
done = ahead.compile_all([replace(launches[0], function=Function())] * 3, 2)
print(json.dumps(done.failed))
"""


def run(script: str, *, orders: str = "", **environment: str) -> Any:
    """In a process of its own, whose Triton never sees a card."""
    unset = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", script], input=orders, capture_output=True, text=True, timeout=560,
        env={**os.environ, **unset, **environment}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "not all of it" not in ended.stderr, ended.stderr
    return json.loads(ended.stdout)


def config(model: str = "qwen3-0.6b", **settings: Any) -> EngineConfig:
    return EngineConfig(model=ModelConfig(path=str(MODELS / model), load_format="dummy"), device="cuda", **settings)


def test_what_is_launched_is_known_from_the_shapes() -> None:
    orders = [config(name, cache=CacheConfig(dtype="fp8")) for name in ("gpt-oss-20b", "llama-3-8b")]
    lines = "\n".join(msgspec.json.encode(order).decode() for order in orders)
    experts, dense = (Counter(names) for names in run(NOTED, orders=lines).values())
    always = {"_prefill_kernel", "_rope_write_kernel", "_rms_norm_kernel", "_argmax_kernel"}
    asked = {
        "_draw_kernel",
        "_penalize_kernel",
        "_bitmask_kernel",
        "_stage_blocks_kernel",
        "_copy_blocks_kernel",
        "_unpack_kernel",
        "_send_kernel",
    }
    for names in (dense, experts):
        assert always | asked <= set(names)
    assert {"_decode_kernel", "_route_kernel", "_grouped_kernel"} <= set(experts)
    assert {"_product_kernel", "_widen_tables_kernel"} <= set(experts), "by how many rows there are"
    assert {"_hopper_decode_kernel", "_transpose_values_kernel", "_hopper_fp8_kernel"} <= set(dense)
    assert "_route_kernel" not in dense
    assert dense["_transpose_values_kernel"] == 1, "one, of however many chunks a step is"
    assert "_hopper_kernel" not in dense, "a cache in FP8 is never read as 16 bits"
    assert "_transpose_values_kernel" not in experts, "attention with sinks would not read them"
    assert dense["_argmax_kernel"] == 1, "each variant once"


def test_a_launch_finds_what_was_compiled_without_a_card(tmp_path: Path) -> None:
    variants, failed, hits = run(FOUND, TRITON_CACHE_DIR=str(tmp_path))
    assert (variants, failed) == (1, {})
    assert hits == [["_note_kernel", True], ["_resolve_kernel", False]], "nobody had asked for the second"
    built = list(tmp_path.rglob("*.so"))
    assert built
    for each in built:  # or they do not find the driver where there is one
        needs = subprocess.run(["readelf", "-d", each], capture_output=True, text=True, check=True).stdout
        assert re.search(r"NEEDED.*libcuda\.so\.1", needs), needs


def test_a_process_that_is_killed_is_a_kernel_that_failed() -> None:
    """By the kernel, where many of them take more memory than there is: nobody waits for it."""
    failed = run(FOR_ONE.replace("{ACT}", "os.kill(os.getpid(), signal.SIGKILL)"))
    assert list(failed) == ["a_kernel"]
    assert "one of 2 processes was killed" in failed["a_kernel"]
    assert "--jobs" in failed["a_kernel"]


def test_processes_that_compile_end_with_the_one_that_gave_them_work() -> None:
    script = FOR_ONE.replace("{ACT}", "os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        process.kill()
    gone, _ = psutil.wait_procs(workers, timeout=120)
    assert len(gone) == 2


def test_the_mark_has_what_kernels_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plain = mark_of(config(), CARDS["h200"])
    assert plain.parent == tmp_path
    assert plain == mark_of(config(jump_forward=False), CARDS["h200"])
    others = [
        mark_of(config(), CARDS["a100"]),
        mark_of(config("llama-3-8b"), CARDS["h200"]),
        mark_of(config(scheduler=SchedulerConfig(max_num_seqs=64)), CARDS["h200"]),
        mark_of(config(cache=CacheConfig(dtype="fp8")), CARDS["h200"]),
        mark_of(config(lora=LoraConfig()), CARDS["h200"]),
        mark_of(config(lora=LoraConfig(max_lora_rank=64)), CARDS["h200"]),
    ]
    assert len({plain, *others}) == 7
    named = mark_of(config(lora=LoraConfig(modules=(("a", "/adapters/a"),))), CARDS["h200"])
    assert named == mark_of(config(lora=LoraConfig()), CARDS["h200"]), "whose adapters they are does not matter"


def test_nothing_is_compiled_where_there_is_no_card_or_the_mark_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_kernels, "start_child", refuse)
    monkeypatch.setattr(compile_kernels, "installed_card", lambda: None)
    compile_kernels.begin(config()).wait()
    monkeypatch.setattr(compile_kernels, "installed_card", lambda: CARDS["h100"])
    with pytest.raises(AssertionError, match="was started"):
        compile_kernels.begin(config())
    compile_kernels.leave_mark(mark_of(config(), CARDS["h100"]))
    compile_kernels.begin(config()).wait()
    compile_kernels.begin(msgspec.structs.replace(config(), device="cpu")).wait()


def test_what_an_image_ships_is_linked_into_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped, cache = tmp_path / "shipped", tmp_path / "home" / "cache"
    (shipped / "ABC").mkdir(parents=True)
    (shipped / "ABC" / "kernel.cubin").write_bytes(b"code")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shipped))
    compile_kernels.leave_mark(mark_of(config(), CARDS["h100"]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setenv("MAINSAIL_KERNELS", str(shipped))
    monkeypatch.setattr(compile_kernels, "installed_card", lambda: CARDS["h100"])
    monkeypatch.setattr(compile_kernels, "start_child", None)
    for _ in range(2):
        compile_kernels.begin(config()).wait()
    assert (cache / "ABC" / "kernel.cubin").read_bytes() == b"code"
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setenv("MAINSAIL_KERNELS", str(tmp_path / "nothing"))
    compile_kernels.begin(config()).wait()


def test_links_to_what_an_earlier_image_shipped_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton takes such a link for a folder of its own, and cannot make it."""
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    (shipped / "ABC").mkdir(parents=True)
    (shipped / "DEF").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setenv("MAINSAIL_KERNELS", str(shipped))
    compile_kernels.link_shipped()
    (cache / "own").mkdir()
    (shipped / "ABC").rmdir()
    compile_kernels.link_shipped()
    assert sorted(entry.name for entry in cache.iterdir()) == ["DEF", "own"]
    (shipped / "DEF").rmdir()
    monkeypatch.delenv("MAINSAIL_KERNELS")
    compile_kernels.link_shipped()
    assert [entry.name for entry in cache.iterdir()] == ["own"]


def test_a_start_goes_on_without_a_cache_or_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing depends on kernels that are compiled ahead."""
    (tmp_path / "shipped" / "ABC").mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAINSAIL_KERNELS", str(tmp_path / "shipped"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compile_kernels, "installed_card", lambda: None)
    compile_kernels.begin(config()).wait()
    assert "file/cache" in caplog.text

    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError("no process can be had")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_kernels, "installed_card", lambda: CARDS["h100"])
    monkeypatch.setattr(compile_kernels, "start_child", refuse)
    compile_kernels.begin(config()).wait()
    assert "no process can be had" in caplog.text


def test_a_card_that_nobody_knows_is_refused_with_those_that_are() -> None:
    assert card_named("H200") == CARDS["h200"]
    with pytest.raises(InvalidConfigurationError, match="no card named 'h300'; give one of h100, h200, a100"):
        card_named("h300")


def test_flags_mean_what_they_mean_to_serve() -> None:
    flags = ["--model", "m", "--max-num-seqs", "64", "--kv-cache-dtype", "fp8"]
    ahead = build_parser().parse_args(["compile-kernels", "--card", "h200", "--jobs", "3", *flags])
    assert engine_config(ahead) == engine_config(build_parser().parse_args(["serve", *flags]))
    assert (ahead.card, ahead.jobs) == ("h200", 3)


def test_less_than_one_process_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compile-kernels", "--model", str(MODELS / "qwen3-0.6b"), "--card", "h200", "--jobs", "0"])
    assert "--jobs must be at least 1" in capsys.readouterr().err
