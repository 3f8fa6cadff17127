"""The engine from Python, with the real model."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mainsail_engine import LLM, SamplingParams, StructuredOutputsParams
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


def test_structured_outputs(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    forms = (
        StructuredOutputsParams(choice=["left", "right"]), StructuredOutputsParams(regex="[0-9]{3}-[0-9]{2}"),
        StructuredOutputsParams(json=schema), StructuredOutputsParams(grammar='root ::= "yes" | "no"'),
    )  # fmt: skip
    params = [SamplingParams(temperature=0, max_tokens=40, structured_outputs=form) for form in forms]
    texts = [output.outputs[0].text for output in llm.generate(["The answer:"] * 4, params)]
    assert texts[0] in ("left", "right")
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", texts[1])
    assert json.loads(texts[2])["age"] <= 99
    assert texts[3] in ("yes", "no")
    with pytest.raises(RequestError, match="structured_outputs"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")))
    with pytest.raises(ValueError, match="exactly one"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams()))


def test_an_answer_that_is_begun(llm: LLM) -> None:
    begun = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of"},
    ]
    (output,) = llm.chat(begun, SamplingParams(temperature=0, max_tokens=10), continue_final_message=True)
    assert output.outputs[0].text == " France is Paris."


def test_log_probabilities_of_prompt_and_answer(llm: LLM) -> None:
    output = llm.generate("The sun is", SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1))[0]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert [entry[token].rank for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)] == [1, 1, 1]
    assert "".join(e[t].decoded_token for t, e in zip(answer.token_ids, answer.logprobs, strict=True)) == answer.text


def test_progress_is_shown_where_somebody_looks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", seen := Terminal())
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in seen.getvalue()
    monkeypatch.setattr("sys.stderr", quiet := Terminal())
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert quiet.getvalue() == ""


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
