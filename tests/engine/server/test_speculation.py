"""Speculative decoding over HTTP: the flag, the same answers, and the metrics that dashboards know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.engine.server.conftest import Engine, start

from mainsail_engine.cli import json_config
from mainsail_engine.config import SpeculativeConfig
from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.protocol import RequestOutput, TokenLogprobs
from mainsail_engine.request import FinishReason, SamplingParams
from mainsail_engine.server.serving import Delta, Job, TextStream
from mainsail_engine.text.tokenizer import load_tokenizer

FLAG = "--speculative-config"
ALWAYS = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "adaptive": false}'


@pytest.fixture(scope="module")
def guessing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    arguments = ("--kv-cache-blocks", "512", "--max-num-seqs", "16", FLAG, ALWAYS)
    running = start(tmp_path_factory.mktemp("guessing"), tiny_model, *arguments)
    yield running
    running.close()


def answer(engine: Engine, **body: object) -> dict[str, object]:
    settings = {"prompt": "the cat and the hat and the bat and the", "max_tokens": 80, "seed": 3, "logprobs": 2} | body
    choice = engine.post("/v1/completions", model=engine.name, **settings).json()["choices"][0]
    return {key: choice[key] for key in ("text", "finish_reason")} | {"tokens": choice["logprobs"]["tokens"]}


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_answers_are_the_same_and_stop_where_they_should(
    tiny_engine: Engine, guessing: Engine, temperature: float
) -> None:
    whole = answer(tiny_engine, temperature=temperature)
    assert answer(guessing, temperature=temperature) == whole
    text = str(whole["text"])
    stop = text[30:33]
    stopped = answer(guessing, temperature=temperature, stop=[stop])
    assert stopped == answer(tiny_engine, temperature=temperature, stop=[stop])
    assert stopped["text"] == text[: text.index(stop)]


def test_an_answer_has_no_tokens_after_its_stop_string(tiny_model: Path) -> None:
    """Several tokens of one step are as they are one by one, with their log-probabilities."""
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer is not None
    tokens = tokenizer.encode("a hat, and a cat. the end", add_special_tokens=False)
    job = Job([0], SamplingParams(max_tokens=99, min_tokens=4), stop=("nd", "cat", "ha"))

    def fed(sizes: list[int]) -> tuple[str, list[int], list[TokenLogprobs], FinishReason | None, int | str | None]:
        stream, last = TextStream(job, tokenizer.detokenizer(skip_special_tokens=True)), Delta("", [])
        text, told, logprobs, start = "", list[int](), list[TokenLogprobs](), 0
        for size in sizes:
            step = tokens[start : start + size]
            start += size
            likely = [TokenLogprobs([token], [-0.5], 1) for token in step]
            last = stream.feed(RequestOutput("r", step, logprobs=likely))
            text, told, logprobs = text + last.text, told + last.token_ids, logprobs + (last.logprobs or [])
            if last.finish_reason is not None:
                break
        return text, told, logprobs, last.finish_reason, last.stop_reason

    one_by_one = fed([1] * len(tokens))
    text, told, logprobs, *end = one_by_one
    assert (text, end) == ("a hat, a", [FinishReason.STOP, "nd"])
    assert len(told) == len(logprobs) < len(tokens)
    for size in range(2, len(tokens) + 1):
        assert fed([size] * len(tokens)) == one_by_one


def test_metrics_have_the_names_of_the_field(guessing: Engine, waiting: Callable[..., None]) -> None:
    answer(guessing, temperature=0.0)
    name = "vllm:spec_decode_num_"
    waiting(guessing.idle, "the metrics of the last step")
    drafts, guesses = guessing.metric(f"{name}drafts_total"), guessing.metric(f"{name}draft_tokens_total")
    right = guessing.metric(f"{name}accepted_tokens_total")
    assert 0 < drafts <= guesses <= 5 * drafts
    assert 0 < right <= guesses
    positions = [guessing.metric(f"{name}accepted_tokens_per_pos_total", position=str(p)) for p in range(5)]
    assert sum(positions) == right
    assert positions == sorted(positions, reverse=True)


def test_the_flag_has_the_fields_spellings() -> None:
    def config(text: str) -> SpeculativeConfig:
        made = json_config(FLAG, text, SpeculativeConfig)
        assert made is not None
        return made

    ngram = config('{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5, "prompt_lookup_min": 2}')
    assert (ngram.is_draft_model, ngram.max_guesses, ngram.ngram_sizes) == (False, 4, (2, 5))
    assert config('{"method": "ngram"}').ngram_sizes == (3, 3)
    assert config('{"method": "ngram", "prompt_lookup_max": 2}').ngram_sizes == (2, 2)
    for text in ('{"model": "/m"}', '{"method": "draft_model", "model": "/m"}', '{"method": "draft", "model": "/m"}'):
        assert config(text).is_draft_model
    assert json_config(FLAG, None, SpeculativeConfig) is None


@pytest.mark.parametrize(
    "text",
    [
        "{", "{}", '{"method": "eagle"}', '{"method": "draft_model"}', '{"method": "ngram", "model": "/m"}',
        '{"method": "ngram", "num_speculative_tokens": 0}', '{"method": "ngram", "num_speculative_tokens": 17}',
        '{"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 2}', '{"method": "ngram", "lookup": 2}',
        '{"model": "/m", "draft_tensor_parallel_size": 2}',
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named(text: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=FLAG):
        json_config(FLAG, text, SpeculativeConfig)
