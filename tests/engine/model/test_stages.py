"""Pipeline stages one after the other in this process: what they compute together, and what each of them holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.model.test_families import COMMON, FAMILIES, prompt_of

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore
from mainsail_engine.errors import InvalidConfigurationError, UnexpectedTensorError
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.loader import Weights
from mainsail_engine.model.parallel import SINGLE, Parallel, check_stages, stage_sizes
from mainsail_engine.model.sources import ALL, SafetensorsSource
from mainsail_engine.protocol import Add, TokenLogprobs
from mainsail_engine.request import Pooling, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.step import PendingLogits, PendingStep, StepPlan


@dataclass(frozen=True, slots=True)
class Linked(Parallel):
    """A stage whose neighbours are in this process."""

    incoming: deque[torch.Tensor] = field(default_factory=deque[torch.Tensor])
    outgoing: deque[torch.Tensor] = field(default_factory=deque[torch.Tensor])

    def pass_on(self, hidden: torch.Tensor) -> None:
        self.outgoing.append(hidden)

    def receive(self, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.incoming.popleft())


class Stages:
    """step.Runner over stages that run one after the other."""

    num_host_blocks = 0

    def __init__(self, config: EngineConfig, num_stages: int) -> None:
        links = [deque[torch.Tensor]() for _ in range(num_stages + 1)]
        self.stages = [
            ModelRunner(config, Linked(0, 1, stage, num_stages, links[stage], links[stage + 1]))
            for stage in range(num_stages)
        ]
        last = self.stages[-1]
        self.num_blocks, self.max_model_len = last.num_blocks, last.max_model_len
        self.eos_token_ids, self.vocab_size = last.eos_token_ids, last.vocab_size
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan) -> PendingStep | PendingLogits:
        self.plans.append(plan)
        return [stage.launch(plan) for stage in self.stages][-1]


def config_of(path: Path, blocks: int = 64) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(path), max_model_len=200, dtype="float32"), cache=CacheConfig(num_blocks=blocks),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=40), device="cpu",
    )  # fmt: skip


def save(folder: Path, name: str, **more: Any) -> Path:
    import transformers

    family = name.split()[0]
    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{kind}Config")(**COMMON | FAMILIES[name] | more)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


PARAMS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 4},
    "penalized": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "edited": {"temperature": 0.0, "logit_bias": ((7, 3.0),), "bad_words": ((9, 11),), "min_tokens": 8},
    "described": {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    "pooled": {"pooling": Pooling.MEAN, "max_tokens": 1},
}


@dataclass
class Answers:
    tokens: dict[str, list[int]]
    logprobs: list[TokenLogprobs]
    embedding: torch.Tensor

    def check_like(self, other: Answers) -> None:
        """The same but for the rounding of other batches."""
        assert self.tokens == other.tokens
        assert [row.token_ids for row in self.logprobs] == [row.token_ids for row in other.logprobs]
        for ours, theirs in zip(self.logprobs, other.logprobs, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        torch.testing.assert_close(self.embedding, other.embedding, atol=1e-4, rtol=1e-4)


def answers(runner: Stages, num_stages: int) -> Answers:
    """What requests of every kind get, together, from prompts that share a beginning, in a pool that is too small."""
    config = config_of(Path("none"))
    scheduler = Scheduler(
        config, runner.num_blocks, runner.max_model_len, [], max_num_batched_tokens=40, micro_batches=num_stages
    )
    core = EngineCore(scheduler, runner, depth=num_stages, micro_batches=num_stages > 1)
    for index, (name, params) in enumerate(PARAMS.items()):
        prompt = prompt_of(40) + prompt_of(11 * index + 3)
        settings = SamplingParams(**{"max_tokens": 30, "ignore_eos": True} | params)  # type: ignore[arg-type]
        core.handle(Add(name, prompt, settings), 0.0)
    found = Answers({name: [] for name in PARAMS if name != "pooled"}, [], torch.empty(0))
    while core.has_work:
        step = core.step(0.0)
        for output in step.outputs if step else ():
            assert output.error is None
            if output.embedding is not None:
                found.embedding = torch.frombuffer(bytearray(output.embedding), dtype=torch.float32)
            else:
                found.tokens[output.request_id] += output.token_ids
            found.logprobs += [*(output.prompt_logprobs or ()), *(output.logprobs or ())]
    assert scheduler.stats().num_preemptions, "the pool was large enough"
    return found


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("Olmo2", "Granite", "Phi3", "Gemma2", "Qwen3Moe")]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mixtral", "Gemma3", *SLOWER])
def test_stages_together_compute_what_one_rank_does(name: str, tmp_path: Path) -> None:
    """Every parameter, chunked prompts, shared prefixes, preemption; two and three stages; nothing else comes out."""
    config = config_of(save(tmp_path, name, tie_word_embeddings=name in ("Llama", "Gemma3")), blocks=20)
    one = Stages(config, 1)
    alone = answers(one, 1)
    assert all(len(tokens) == 30 for tokens in alone.tokens.values())
    assert len(alone.logprobs) == 30 + 40 + 11 * 4 + 3 - 1
    assert len(alone.embedding) == 32
    for num_stages in (2, 3):
        runner = Stages(config, num_stages)
        answers(runner, num_stages).check_like(alone)
        assert [stage.kv_cache.shape[0] for stage in runner.stages] == stage_sizes(4, num_stages, 0.4)
        assert {is_compiled(stage) for stage in runner.stages} == {is_compiled(one.stages[0])}


def is_compiled(runner: ModelRunner) -> bool:
    """Whether its layers are one call of the CPU's kernels."""
    return getattr(runner._model, "_whole", None) is not None


class Recorded(SafetensorsSource):
    """Remembers what was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: set[str] = set()

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        self.read.add(name)
        return super().tensor(name, rows, columns)


def stage(source: Recorded, path: Path, parallel: Parallel) -> LlamaForCausalLM:
    device = torch.device("cpu")
    weights = Weights(source, device, torch.float32)
    return LlamaForCausalLM(read_architecture(path), weights, max_positions=64, device=device, parallel=parallel)


@pytest.mark.parametrize("tied", [True, False])
def test_a_stage_reads_its_own_tensors_only(tied: bool, tmp_path: Path) -> None:
    path = save(tmp_path, "Llama", tie_word_embeddings=tied)
    reads: list[set[str]] = []
    for index in range(3):
        source = Recorded(path)
        model = stage(source, path, Parallel(stage=index, num_stages=3))
        reads.append({name.removesuffix(".weight").removeprefix("model.") for name in source.read})
        assert len(model.layers) == [2, 1, 1][index]
    layers = [{int(name.split(".")[1]) for name in read if name.startswith("layers.")} for read in reads]
    assert layers == [{0, 1}, {2}, {3}]
    others = [{name for name in read if not name.startswith("layers.")} for read in reads]
    assert others == [{"embed_tokens"}, set(), {"embed_tokens" if tied else "lm_head", "norm"}]
    whole = Recorded(path)
    stage(whole, path, SINGLE)
    assert set().union(*reads) == {name.removesuffix(".weight").removeprefix("model.") for name in whole.read}


def test_a_tensor_that_no_stage_has_is_still_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, "Llama")
    source = Recorded(path)
    source.names |= {"model.layers.1.self_attn.sink"}
    with pytest.raises(UnexpectedTensorError, match="sink"):
        stage(source, path, Parallel(stage=0, num_stages=2))
    stage(source, path, Parallel(stage=1, num_stages=2))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "head", "sizes"),
    [
        (32, 1, 2.4, [32]), (32, 2, 0.0, [16, 16]), (32, 2, 2.4, [17, 15]), (32, 4, 2.4, [9, 9, 8, 6]),
        (4, 4, 3.0, [1, 1, 1, 1]), (7, 3, 0.0, [3, 2, 2]), (80, 8, 0.9, [11, 10, 10, 10, 10, 10, 10, 9]),
    ],
)  # fmt: skip
def test_layers_are_shared_out_with_the_heads_work_counted(
    num_layers: int, num_stages: int, head: float, sizes: Sequence[int]
) -> None:
    assert stage_sizes(num_layers, num_stages, head) == list(sizes)


def test_more_stages_than_layers_are_refused_with_those_that_fit(tmp_path: Path) -> None:
    architecture = read_architecture(save(tmp_path, "Llama"))
    with pytest.raises(InvalidConfigurationError, match=r"--pipeline-parallel-size 5: the model has 4 .* fit: 1 to 4"):
        check_stages(architecture, 5)
    check_stages(architecture, 4)
