"""The engine from Python, with the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mainsail_engine import LLM, SamplingParams
from mainsail_engine.errors import InvalidConfigurationError, ModelNotFoundError, RequestError

pytestmark = pytest.mark.model
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    with LLM(model=str(smollm2), kv_cache_blocks=256, max_num_seqs=16, dtype="float32") as loaded:
        yield loaded


def test_outputs_are_in_order(llm: LLM) -> None:
    prompts = ["One two three", "The sun", "Once upon a time"]
    together = llm.generate(prompts, [GREEDY, SamplingParams(temperature=0, max_tokens=2), GREEDY])
    assert [output.prompt for output in together] == prompts
    assert [len(output.outputs[0].token_ids) for output in together] == [8, 2, 8]
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0] for prompt in prompts]
    assert together[0].outputs[0].token_ids == alone[0].token_ids
    assert together[2].outputs[0].text == alone[2].text


def test_token_ids_as_prompt(llm: LLM) -> None:
    text = llm.generate("The sun", GREEDY)[0]
    ids: Any = {"prompt_token_ids": text.prompt_token_ids}
    assert llm.generate(ids, GREEDY)[0].outputs == text.outputs


def test_chat(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    outputs = llm.chat([question, question], SamplingParams(temperature=0, max_tokens=20, stop="."))
    assert [output.outputs[0].text for output in outputs] == ["The capital of France is Paris"] * 2
    assert outputs[0].outputs[0].stop_reason == "."
    assert len(llm.chat(question, GREEDY)) == 1


def test_several_answers(llm: LLM) -> None:
    output = llm.generate("The weather", SamplingParams(n=3, seed=1, max_tokens=8))[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({answer.text for answer in output.outputs}) > 1


def test_bad_parameters_are_named(llm: LLM) -> None:
    with pytest.raises(ValueError, match="temperature"):
        llm.generate("x", SamplingParams(temperature=-1))
    with pytest.raises(ValueError, match="give one, or one for each"):
        llm.generate(["x"], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match=r"messages\.0\.role"):
        llm.chat([{"role": "nobody", "content": "x"}])
    with pytest.raises(RequestError, match="max_tokens"):
        llm.generate("x", SamplingParams(max_tokens=100_000))
    assert llm.generate("x", GREEDY)[0].outputs[0].token_ids


def test_no_model() -> None:
    with pytest.raises(ModelNotFoundError):
        LLM(model="/nowhere")
    with pytest.raises(InvalidConfigurationError, match="dtype"):
        LLM(model="/nowhere", dtype="int3")
