"""Several ranks over gloo on the CPU: the same tokens as one, and a rank that dies or hangs ends the engine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.engine.processes import children

from mainsail_engine.client import EngineDeadError
from mainsail_engine.errors import StartupError
from mainsail_engine.llm import LLM, Prompt, SamplingParams
from mainsail_engine.runner import workers

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Olmo2": {},
    "Mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "GptOss": {"head_dim": 16, "sliding_window": 24, "num_experts_per_tok": 2, "num_local_experts": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("ranks"))


def make_models(root: Path) -> Path:
    """A folder for each family: random weights, and the tokenizer that the API side needs."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for family, more in MODELS.items():
        torch.manual_seed(3)
        config = getattr(transformers, f"{family}Config")(**COMMON | more)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(root / family)
        tokenizer.save(str(root / family / "tokenizer.json"))
    return root


@cache
def answers(path: Path, ranks: int, guesser: str = "") -> list[list[int]]:
    """Greedy and sampled, of prompts that share a beginning, with a pool too small for all at once."""
    by = {"ngram": {"method": "ngram"}, "draft": {"model": str(path)}}
    speculative = {**by[guesser], "num_speculative_tokens": 5, "adaptive": False} if guesser else None
    prompts = [[5, 6, 7, 8] * 8 + [length] * length for length in (1, 9, 30, 55)] * 2
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    sampled = [SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, seed=i, ignore_eos=True) for i in range(4)]
    with LLM(
        str(path), tensor_parallel_size=ranks, max_num_seqs=8, kv_cache_blocks=28, speculative_config=speculative,
        device="cpu",
    ) as llm:  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], [greedy] * 4 + sampled)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("family", "ranks"),
    [("Llama", 2), ("Llama", 4), ("Qwen3", 2), ("Olmo2", 2), ("Olmo2", 4), ("Mixtral", 2), ("GptOss", 2)],
)
def test_ranks_give_the_tokens_of_one(folder: Path, family: str, ranks: int) -> None:
    """Four ranks have fewer key and value heads than there are ranks: they are repeated."""
    alone = answers(folder / family, 1)
    assert all(len(tokens) == 24 for tokens in alone)
    assert answers(folder / family, ranks) == alone


@pytest.mark.parametrize("guesser", ["ngram", "draft"])
def test_ranks_verify_guesses_together(folder: Path, guesser: str) -> None:
    """A draft model runs on the first rank only."""
    assert answers(folder / "Llama", 2, guesser) == answers(folder / "Llama", 1)


def test_a_size_that_does_not_divide_is_refused_with_those_that_do(folder: Path) -> None:
    with pytest.raises(StartupError, match=r"--tensor-parallel-size 3 does not divide .* these do: 1, 2, 4"):
        LLM(str(folder / "Llama"), tensor_parallel_size=3, device="cpu")


def take_its_memory(rank: psutil.Process) -> None:
    """It gets no more of it."""
    used = rank.memory_info().vms
    rank.rlimit(psutil.RLIMIT_AS, (used, used))


LOSSES: dict[str, tuple[Callable[[psutil.Process], object], str]] = {
    "killed": (psutil.Process.kill, "rank 1 was killed by signal 9"),
    "stopped": (psutil.Process.suspend, "rank 1 has been silent"),
    "out of memory": (take_its_memory, "rank 1 (ended with code 1|was killed by signal (6|11))"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_rank_is_noticed_and_ends_the_engine(folder: Path, loss: str) -> None:
    """In the middle of an answer: it ends with an error, and the core process is gone."""
    lose, words = LOSSES[loss]
    long = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    prompts: list[Prompt] = [{"prompt_token_ids": [5, 6, 7] * (1 + n)} for n in range(64)]
    others = children("mainsail_engine.core") | children("tp_worker")
    llm = LLM(str(folder / "Llama"), tensor_parallel_size=2, kv_cache_blocks=250, device="cpu")
    (core,) = children("mainsail_engine.core") - others
    (rank,) = children("tp_worker") - others

    def answer_for_ever() -> None:
        while True:
            llm.generate(prompts, long)

    try:
        threading.Timer(0.3, lose, (rank,)).start()
        with pytest.raises(EngineDeadError, match=words):
            answer_for_ever()
        core.wait(timeout=240)
    finally:
        if rank.is_running():
            rank.kill()
        llm.close()


@pytest.mark.slow
def test_a_leader_that_was_stopped_itself_finds_its_ranks_alive(folder: Path) -> None:
    """For longer than a rank may be silent."""
    prompt: Prompt = {"prompt_token_ids": [5, 6, 7]}
    short = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    others = children("mainsail_engine.core")
    with LLM(str(folder / "Llama"), tensor_parallel_size=4, kv_cache_blocks=32, device="cpu") as llm:
        before = llm.generate(prompt, short)[0].outputs
        (core,) = children("mainsail_engine.core") - others
        core.suspend()
        time.sleep(workers.SILENT_S + 2.0)
        core.resume()
        time.sleep(1.0)  # the watcher's turn
        assert llm.generate(prompt, short)[0].outputs == before


HANGING = """
import itertools, os, signal, sys, threading, time, psutil
from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig
from mainsail_engine.core import build
from mainsail_engine.protocol import Add
from mainsail_engine.request import SamplingParams
from mainsail_engine.runner import workers

workers.CPU_STEP_LIMIT_S = 2.0

def lost(why):
    print(why, flush=True)
    os._exit(0)

config = EngineConfig(
    model=ModelConfig(path=sys.argv[1]), cache=CacheConfig(num_blocks=64), tensor_parallel_size=2, device="cpu"
)
core, _ = build(config, lost)
(rank,) = psutil.Process().children()
threading.Timer(0.3, rank.send_signal, (signal.SIGUSR1,)).start()
for name in itertools.count():
    core.handle(Add(str(name), [5, 6, 7], SamplingParams(max_tokens=490, temperature=0.0, ignore_eos=True)), 0.0)
    while core.has_work:
        core.step(time.monotonic())
"""


def test_a_rank_that_hangs_in_a_step_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Its thread that computes does nothing more while the others go on: it beats, and finishes no step."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *unused: time.sleep(600))\n"
    )
    command = [sys.executable, "-c", HANGING, str(folder / "Llama")]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=240, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ended.stdout.strip() == "rank 1 has not finished a step within 2 s"


SLEEPING = """
import os, sys, time
from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig
from mainsail_engine.core import build
from mainsail_engine.errors import OutOfMemoryError
from mainsail_engine.protocol import Control
from mainsail_engine.runner.model_runner import ModelRunner

def lost(why):
    print(f"lost: {why}", flush=True)
    os._exit(0)

def refuse(self, config):
    raise OutOfMemoryError("the device has too little memory")

config = EngineConfig(
    model=ModelConfig(path=sys.argv[1]), cache=CacheConfig(num_blocks=64), tensor_parallel_size=2, device="cpu"
)
core, _ = build(config, lost)
ModelRunner.wake_up = refuse  # of rank 0; the other is another process
for action in ("sleep", "wake_up"):
    core.handle(Control(action, action), 0.0)
    print(action, [answer.error for answer in core.take_answers()], flush=True)
"""


def test_ranks_of_which_the_first_cannot_wake_up_end(folder: Path) -> None:
    """The others are awake, and wait for it: another try would find them one step ahead."""
    command = [sys.executable, "-c", SLEEPING, str(folder / "Llama")]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    assert ended.stdout.splitlines() == [
        "sleep [None]", "lost: rank 0 could not wake up: the device has too little memory",
    ]  # fmt: skip
