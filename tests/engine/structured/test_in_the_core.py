"""Constrained requests through scheduler, runner and sampler: they conform, and disturb nobody.

A tiny model with random weights over SmolLM2's vocabulary: nothing but the grammar makes its output conform.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from benchmarks.speculation import Replay, always
from tests.engine.one_place import logits_in_one_place

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore
from mainsail_engine.protocol import Abort, Add, RequestOutput
from mainsail_engine.request import FinishReason, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.runner.swap import HostMemory, HostSwap, SwappingRunner
from mainsail_engine.scheduler import Scheduler
from mainsail_engine.speculative.speculator import Speculator
from mainsail_engine.structured import grammar as g
from mainsail_engine.structured import masks
from mainsail_engine.structured.compiler import Compiler
from mainsail_engine.structured.vocabulary import Vocabulary

pytestmark = pytest.mark.model
TINY = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 49152, "eos_token_id": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["person", "company"]},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "scores"],
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "min_tokens": 3, "frequency_penalty": 0.5}
PERSON = g.json_schema(SCHEMA, strict=True)
PHONE = g.regex("[0-9]{3}-[0-9]{4}")
ANSWER = g.choice(["yes, certainly", "no, never"])


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(TINY))
    made = ModelRunner(config(path))
    torch.set_num_threads(1)  # its operations are too small to share
    return made


def config(path: Path | str = "none", *, max_num_batched_tokens: int = 128) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(path), load_format="dummy"),
        cache=CacheConfig(num_blocks=512),
        scheduler=SchedulerConfig(max_num_seqs=48, max_num_batched_tokens=max_num_batched_tokens),
        device="cpu",
    )


class Engine:
    """A core over the shared runner, on a clock of its own; `run` drives it to the end, checking the books after every
    step."""

    def __init__(self, runner: ModelRunner, vocabulary: Vocabulary, *, depth: int, jump_forward: bool, blocks: int,
                 speculator: Speculator | None = None, host: int = 0, **limits: Any) -> None:  # fmt: skip
        layers, _, *rest = runner.kv_cache.shape
        memory = HostMemory((layers, *rest), runner.dtype, host * runner.kv_cache[:, 0].nbytes)
        swapping = SwappingRunner(runner, HostSwap(runner.kv_cache, memory))
        self.vocabulary, self.num_steps, self.now = vocabulary, 0, 0.0
        self.scheduler = Scheduler(config(**limits), blocks, 512, {2}, speculator=speculator)
        self.compiler = Compiler(lambda: vocabulary, jump_forward=jump_forward)
        self.core = EngineCore(self.scheduler, swapping, depth=depth, compiler=self.compiler)
        self.outputs: list[RequestOutput] = []

    def add(
        self, name: str, grammar: g.Grammar | None, *, prompt: int = 20, timeout_s: float | None = None, **params: Any
    ) -> None:
        settings: dict[str, Any] = {"max_tokens": 200, "temperature": 0.0} | params
        number = sum(name.encode())
        ids = [(7 * i + 31 * number) % 5000 + 100 for i in range(prompt)]
        self.core.handle(Add(name, ids, SamplingParams(**settings), timeout_s=timeout_s, grammar=grammar), self.now)

    def compile(self, *grammars: g.Grammar) -> None:
        """Beforehand, so that no request waits for it: what is admitted when does not depend on the machine."""
        for grammar in grammars:
            verdict: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            self.compiler.submit(grammar, verdict.put)
            assert verdict.get(timeout=240) is None

    def run(self) -> dict[str, list[int]]:
        while self.core.has_work:
            self.step()
        tokens: dict[str, list[int]] = {}
        for output in self.outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return tokens

    def step(self) -> None:
        """A step takes 10 ms on the core's clock, whatever it takes here."""
        self.now += 0.01
        outputs = self.core.step(self.now)
        self.scheduler.check_integrity()
        if outputs is None:
            time.sleep(0.001)
            return
        self.num_steps += 1
        self.outputs += outputs.outputs

    def text(self, tokens: list[int]) -> str:
        return b"".join(self.vocabulary.tokens[token] for token in tokens).decode()

    def constraint_of(self, name: str) -> Any:
        """Once it is compiled."""
        request = self.scheduler._requests.get(name)
        return request and request.constraint

    def ends(self) -> dict[str, RequestOutput]:
        return {output.request_id: output for output in self.outputs if output.finish_reason}


@pytest.fixture
def engine(runner: ModelRunner, vocabulary: Vocabulary) -> Callable[..., Engine]:
    def make(*, depth: int = 1, jump_forward: bool = False, blocks: int = 512, **limits: Any) -> Engine:
        runner.kv_cache.fill_(float("nan"))
        return Engine(runner, vocabulary, depth=depth, jump_forward=jump_forward, blocks=blocks, **limits)

    return make


def mixed(engine: Engine, count: int = 8, **params: Any) -> None:
    """Constrained and free requests of several kinds, all of them ready to run at once."""
    engine.compile(PERSON, PHONE, ANSWER)
    for i in range(count):
        grammar = (PERSON, None, PHONE, ANSWER)[i % 4]
        engine.add(f"{i:02}", grammar, prompt=5 + 9 * i, max_tokens=24 if grammar is None else 200, **params)


def check(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for name, ids in tokens.items():
        kind = int(name) % 4
        if kind == 1:
            assert len(ids) == 24
            continue
        assert engine.ends()[name].finish_reason is FinishReason.STOP
        text = engine.text(ids)
        if kind == 0:
            jsonschema.validate(json.loads(text), SCHEMA)
        elif kind == 2:
            assert len(text) == 8
            assert text[3] == "-"
        else:
            assert text in ("yes, certainly", "no, never")


@pytest.mark.parametrize("jump_forward", [False, True])
def test_all_conform_and_the_pipeline_changes_nothing(engine: Callable[..., Engine], jump_forward: bool) -> None:
    results = []
    for depth in (1, 2):
        made = engine(depth=depth, jump_forward=jump_forward)
        mixed(made, temperature=1.0, seed=7)
        results.append(made.run())
        check(made, results[-1])
    assert results[0] == results[1] or jump_forward
    free = [{name: ids for name, ids in result.items() if int(name) % 4 == 1} for result in results]
    assert free[0] == free[1]


@pytest.mark.parametrize("depth", [1, 2])
def test_constrained_rows_are_sampled_before_the_next_step_begins(
    engine: Callable[..., Engine], runner: ModelRunner, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their masks wait for the step before; the logits may lie where the step after writes."""
    plain = engine()
    mixed(plain, temperature=1.0, seed=7, logprobs=1)
    expected = plain.run()
    rows = logits_in_one_place(runner, monkeypatch)
    made = engine(depth=depth)
    mixed(made, temperature=1.0, seed=7, logprobs=1)
    assert made.run() == expected
    assert max(rows) >= 8


def growing(engine: Engine, **params: Any) -> None:
    """Prompts of one block each; most answers grow to five."""
    engine.compile(PERSON)
    for name in ("00", "04", "08", "12", "16", "20"):
        engine.add(name, PERSON, prompt=12, **params)
    for name in ("01", "05"):
        engine.add(name, None, prompt=12, max_tokens=24, **params)


@pytest.mark.parametrize(("blocks", "host"), [(512, 0), (10, 0), (10, 64)], ids=["room", "recomputed", "swapped"])
@pytest.mark.parametrize(
    ("params", "jump_forward"), [(GREEDY, False), (GREEDY, True), (SEEDED, False)],
    ids=["greedy", "greedy, with jumps", "seeded"],
)  # fmt: skip
def test_guesses_and_preemption_change_nothing(
    engine: Callable[..., Engine], params: dict[str, Any], jump_forward: bool, blocks: int, host: int
) -> None:
    """Guesses right and wrong, some of which the grammar forbids, in a pool that holds all, or throws requests out
    while they are guessed at. The tokens are those of neither (but for jumps, which are as long as guesses and room
    let them be: with those, the answers conform)."""
    plain = engine(jump_forward=jump_forward)
    growing(plain, **params)
    expected = plain.run()
    guesser = Replay(expected, right=0.8, vocab_size=49152)
    guessing = engine(jump_forward=jump_forward, depth=2, blocks=blocks, host=host, speculator=always(guesser))
    growing(guessing, **params)
    got = guessing.run()
    check(guessing, got)
    if not jump_forward:
        assert got == expected
    stats = guessing.scheduler.stats()
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 20
    assert (stats.num_preemptions >= 3) == (blocks == 10)
    assert (stats.num_swapped_in > 0) == (host > 0 and blocks == 10)
    if blocks == 512:
        assert guessing.num_steps < 0.6 * plain.num_steps


def test_alone_as_in_a_batch(engine: Callable[..., Engine]) -> None:
    batch = engine(depth=2)
    mixed(batch)
    together = batch.run()
    for i in (0, 2, 3):
        alone = engine(depth=2)
        alone.add(f"{i:02}", (PERSON, None, PHONE, ANSWER)[i], prompt=5 + 9 * i)
        assert alone.run()[f"{i:02}"] == together[f"{i:02}"]


def test_jumps_save_steps(engine: Callable[..., Engine]) -> None:
    steps = {}
    for jump_forward in (False, True):
        made = engine(jump_forward=jump_forward)
        made.add("a", g.json_schema({"const": {"a long enough key": "and a long enough value"}}, strict=True))
        text = made.text(made.run()["a"])
        assert json.loads(text) == {"a long enough key": "and a long enough value"}
        steps[jump_forward] = made.num_steps
    assert steps[True] <= 2 < 5 < steps[False]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("jump_forward", [False, True])
def test_preemption_changes_nothing(engine: Callable[..., Engine], depth: int, jump_forward: bool) -> None:
    results = []
    for blocks in (512, 12):
        made = engine(depth=depth, jump_forward=jump_forward, blocks=blocks)
        mixed(made)
        results.append(made.run())
        check(made, results[-1])
    assert made.scheduler.stats().num_preemptions > 0
    assert results[0] == results[1] or jump_forward  # a jump needs blocks, and may be shorter without


def test_small_chunks_and_cached_prefixes_change_nothing(engine: Callable[..., Engine]) -> None:
    whole = engine(jump_forward=True)
    whole.add("a", PERSON, prompt=100)
    expected = whole.run()["a"]
    chunked = engine(jump_forward=True, max_num_batched_tokens=48)
    chunked.add("a", PERSON, prompt=100)
    assert chunked.run()["a"] == expected
    hits = chunked.scheduler.stats().prefix_cache_hits
    chunked.outputs.clear()
    chunked.add("a", PERSON, prompt=100)
    assert chunked.run()["a"] == expected
    assert chunked.scheduler.stats().prefix_cache_hits > hits
    assert all(output.num_cached_tokens <= 100 for output in chunked.outputs)


def test_max_tokens_cuts_also_what_is_forced(engine: Callable[..., Engine]) -> None:
    for most in (1, 2, 3, 5):
        made = engine(jump_forward=True)
        made.add("a", g.json_schema({"const": {"a long enough key": 1}}, strict=True), max_tokens=most)
        assert len(made.run()["a"]) == most
        assert made.ends()["a"].finish_reason is FinishReason.LENGTH


def test_a_complete_text_ends_whatever_min_tokens_and_ignore_eos_say(engine: Callable[..., Engine]) -> None:
    for jump_forward in (False, True):
        made = engine(jump_forward=jump_forward)
        made.add("a", PHONE, min_tokens=100, ignore_eos=True)
        made.add("b", g.regex("[ab]{1,40}"), min_tokens=6)
        tokens = made.run()
        assert len(made.text(tokens["a"])) == 8
        assert len(tokens["b"]) >= 6
        assert {end.finish_reason for end in made.ends().values()} == {FinishReason.STOP}


def test_logprobs_are_the_models_own_and_switch_jumps_off(engine: Callable[..., Engine]) -> None:
    made = engine(jump_forward=True)
    made.add("a", ANSWER, logprobs=2)
    tokens = made.run()["a"]
    logprobs = [position for output in made.outputs for position in output.logprobs or []]
    assert len(logprobs) == len(tokens)
    assert max(position.logprobs[0] for position in logprobs) < -5  # of 49152 tokens, and not of the two allowed ones
    assert made.text(tokens) in ("yes, certainly", "no, never")


def test_penalties_and_bias_work_under_a_grammar(engine: Callable[..., Engine], vocabulary: Vocabulary) -> None:
    made = engine(jump_forward=True)
    nine = vocabulary.tokens.index(b"9")
    made.add("a", g.regex("[0-9]{20}"), logit_bias=((nine, 100.0),), temperature=0.0)
    made.add("b", g.regex("[0-9]{10}"), frequency_penalty=2.0, temperature=0.0)
    tokens = made.run()
    assert made.text(tokens["a"]) == "9" * 20
    assert len(made.text(tokens["b"])) == 10


def test_a_row_of_nan_fails_alone(engine: Callable[..., Engine], runner: ModelRunner) -> None:
    made = engine(depth=2)
    made.add("bad", PERSON)
    made.add("good", PERSON)
    while not made.outputs:
        made.step()
    request = next(r for r in made.scheduler._decoding if r.request_id == "bad")
    runner.kv_cache[:, request.block_ids[0]] = float("nan")
    tokens = made.run()
    assert made.ends()["bad"].finish_reason is FinishReason.ERROR
    jsonschema.validate(json.loads(made.text(tokens["good"])), SCHEMA)


def test_a_grammar_that_is_bad_after_all_fails_its_request_alone(engine: Callable[..., Engine]) -> None:
    made = engine()
    made.add("bad", g.ebnf("root ::= nothing"))
    made.add("good", PHONE)
    tokens = made.run()
    end = made.ends()["bad"]
    assert (end.finish_reason, end.stop_reason) == (FinishReason.ERROR, "grammar")
    assert len(made.text(tokens["good"])) == 8


def test_aborts_and_deadlines_while_the_grammar_is_compiled(engine: Callable[..., Engine]) -> None:
    made = engine()
    slow = g.Grammar(g.Kind.JSON_SCHEMA, '{"items":' * 3000 + "{}" + "}" * 3000)
    made.add("aborted", slow)
    made.add("late", slow, timeout_s=0.2)
    made.add("good", ANSWER)
    made.core.handle(Abort(["aborted"]), made.now)
    made.now += 0.2
    made.run()
    ends = made.ends()
    assert "aborted" not in ends
    assert (ends["late"].finish_reason, ends["late"].stop_reason) == (FinishReason.ERROR, "deadline")
    assert ends["good"].finish_reason is FinishReason.STOP


def test_aborts_in_flight_leave_the_others_alone(engine: Callable[..., Engine]) -> None:
    made = engine(depth=2, jump_forward=True)
    mixed(made)
    for count in range(40):
        made.step()
        if count == 12:
            made.core.handle(Abort(["00", "02", "01"]), made.now)
    tokens = made.run()
    check(made, {name: ids for name, ids in tokens.items() if name not in ("00", "01", "02")})
    assert not made.core.has_work


def test_a_grammar_that_turns_out_slow_fails_its_request_alone(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit that every row is beyond: three slow masks are the end, and free requests go on."""
    monkeypatch.setattr(masks, "SLOW_STEP_S", -1.0)
    monkeypatch.setattr(masks, "SLOW_ROW_S", -1.0)
    made = engine(depth=2)
    made.add("slow", PERSON)
    made.add("free", None, max_tokens=20)
    tokens = made.run()
    end = made.ends()["slow"]
    assert (end.finish_reason, end.stop_reason) == (FinishReason.ERROR, "grammar")
    assert len(tokens["free"]) == 20


class Broken:
    """A matcher of which one method raises, as a bug in the library would."""

    def __init__(self, matcher: Any, broken: str) -> None:
        for name in ("accept_token", "find_jump_forward_string", "rollback", "is_terminated", "is_completed"):
            setattr(self, name, getattr(matcher, name))
        self.fill_next_token_bitmask = matcher.fill_next_token_bitmask
        setattr(self, broken, self._raise)

    def _raise(self, *_: object) -> None:
        raise RuntimeError("broken")


class BrokenBatch:
    """The library fills masks of its own matchers only: what it would say of the batch, were one of them broken."""

    def batch_fill_next_token_bitmask(self, *_: object) -> None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("name", ["fill_next_token_bitmask", "accept_token", "find_jump_forward_string"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_matcher_that_raises_fails_its_request_alone(engine: Callable[..., Engine], name: str, depth: int) -> None:
    busy = engine(depth=depth, jump_forward=True)
    mixed(busy)
    tokens = busy.run()
    again = engine(depth=depth, jump_forward=True)
    mixed(again)
    while not (constraint := again.constraint_of("04")):
        again.step()
    constraint.matcher = Broken(constraint.matcher, name)
    filler = again.core._filler = masks.MaskFiller()
    filler._alone = filler._together = BrokenBatch()
    after = again.run()
    failed = again.ends()["04"]
    assert (failed.finish_reason, failed.stop_reason) == (FinishReason.ERROR, "grammar")
    assert failed.error
    assert {name: ids for name, ids in after.items() if name != "04"} == {
        name: ids for name, ids in tokens.items() if name != "04"
    }
