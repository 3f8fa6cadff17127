"""/v1/embeddings of an embedding model: a decoder without its head, whose files say how states become a vector."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.server.conftest import Engine, start
from tests.engine.tiny import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last token's state, of length 1; its first 8 and 16 numbers are embeddings too."""
    path = make_tiny_model(tmp_path_factory.mktemp("embedding") / "model", max_len=128)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["LlamaModel"], "matryoshka_dimensions": [8, 16]}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    headless = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(headless, path / "model.safetensors", metadata={"format": "pt"})
    kinds = ("Transformer", "Pooling", "Normalize")
    steps = [
        {"path": f"{index}_{kind}", "type": f"sentence_transformers.models.{kind}"} for index, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(steps))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return path


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    running = start(tmp_path_factory.mktemp("embedding-engine"), folder, "--kv-cache-blocks", "256")
    yield running
    running.close()


@pytest.fixture(scope="module")
def truth(folder: Path) -> Any:
    """A prompt's last state from transformers, not of length 1."""
    import transformers

    model: Any = transformers.LlamaModel.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def last(tokens: list[int]) -> np.ndarray:
        return model(torch.tensor([tokens])).last_hidden_state[0, -1].numpy()

    return last


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_texts_and_tokens_alone_and_in_batches(server: Engine, truth: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    texts = ["the first", "another one", "the first"]
    tokens = [server.post("/tokenize", prompt=text).json()["tokens"] for text in texts]
    for given, expected in ((texts, tokens), (tokens, tokens), (texts[0], tokens[:1]), (tokens[1], tokens[1:2])):
        answer = client.embeddings.create(model="smol", input=given)  # asks for base64
        assert [item.index for item in answer.data] == list(range(len(expected)))
        for item, ids in zip(answer.data, expected, strict=True):
            assert item.embedding == pytest.approx(unit(truth(ids)), abs=1e-4)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, expected))


def test_forms_of_the_answer(server: Engine, truth: Any) -> None:
    tokens = [5, 6, 7, 8]
    whole = truth(tokens)

    def embed(**fields: object) -> Any:
        answer = server.post("/v1/embeddings", model="smol", input=tokens, **fields).json()
        return answer["data"][0]["embedding"] if "data" in answer else answer["error"]

    assert embed(encoding_format="float") == pytest.approx(unit(whole), abs=1e-4)
    raw = np.frombuffer(base64.b64decode(embed(encoding_format="base64", dimensions=8)), "<f4")
    assert raw == pytest.approx(unit(whole[:8]), abs=1e-4)
    assert embed(dimensions=16, normalize=False) == pytest.approx(whole[:16], abs=1e-3)
    assert embed(dimensions=32) == pytest.approx(unit(whole), abs=1e-4)
    assert embed(pooling="cls") == pytest.approx(unit(truth(tokens[:1])), abs=1e-4)
    refused = embed(dimensions=12)
    assert refused["param"] == "dimensions"
    assert "8, 16 numbers" in refused["message"]


def test_it_makes_no_text(server: Engine) -> None:
    bodies: dict[str, dict[str, object]] = {
        "/v1/completions": {"prompt": "Hi"}, "/v1/responses": {"input": "Hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    }  # fmt: skip
    for path, body in bodies.items():
        answer = server.post(path, model="smol", **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "embedding_model"
