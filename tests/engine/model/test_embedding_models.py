"""Embedding models against transformers with sentence-transformers' steps, on tiny random weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.core import EngineCore, build
from mainsail_engine.errors import InvalidConfigurationError, RequestError, StartupError, UnsupportedModelError
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.parallel import check_divides
from mainsail_engine.protocol import Add, RequestOutput
from mainsail_engine.request import Pooling, SamplingParams
from mainsail_engine.text.embedding import EmbeddingForm, read_embedding_form

VOCAB, LONGEST = 96, 64
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertModel", ENCODER | {"max_position_embeddings": LONGEST}),
    "Roberta": ("RobertaModel", ENCODER | {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}),
    "XLMRoberta": ("XLMRobertaModel", ENCODER | {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}),
    "Qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 16}),
    "Mistral": ("MistralModel", DECODER | {"sliding_window": 24}),
}


def save(kind: str, path: Path, modules: list[tuple[str, dict[str, Any] | None]]) -> Any:
    """That kind of model in path, with sentence-transformers' files; returns transformers' own, without its head."""
    import transformers

    some: Any = transformers
    name, settings = MODELS[kind]
    torch.manual_seed(5)
    model = getattr(some, name)(getattr(some, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    steps: list[dict[str, Any]] = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    for index, (step, config) in enumerate(modules, 1):
        folder = f"{index}_{step}"
        kind_of = f"sentence_transformers.models.{step}"
        steps.append({"idx": index, "name": str(index), "path": folder, "type": kind_of})
        (path / folder).mkdir()
        if config is not None:
            (path / folder / "config.json").write_text(json.dumps(config))
    (path / "modules.json").write_text(json.dumps(steps))
    return model.model if name.endswith("ForCausalLM") else model


def pooled_by(mode: str) -> tuple[str, dict[str, Any]]:
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return "Pooling", {"word_embedding_dimension": 32} | {f"pooling_mode_{name}": name == mode for name in modes}


def core_of(path: Path, budget: int = 0, device: str = "cpu") -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(path=str(path), dtype="float32"),
        cache=CacheConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget or None),
        device=device,
    )
    return build(config)[0]


def embed(core: EngineCore, prompts: list[list[int]], pooling: Pooling) -> list[np.ndarray]:
    params = SamplingParams(max_tokens=1, temperature=0.0, pooling=pooling)
    for index, prompt in enumerate(prompts):
        core.handle(Add(str(index), prompt, params), time.monotonic())
    found: dict[str, bytes] = {}
    while core.has_work:
        outputs = core.step(time.monotonic())
        told: list[RequestOutput] = outputs.outputs if outputs else []
        for output in told:
            assert not output.error
            found |= {output.request_id: output.embedding} if output.embedding is not None else {}
    return [np.frombuffer(found[str(index)], np.float32) for index in range(len(prompts))]


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("kind", "mode", "pooling"),
    [
        ("Bert", "cls_token", Pooling.CLS), ("Roberta", "mean_tokens", Pooling.MEAN),
        ("XLMRoberta", "lasttoken", Pooling.LAST), ("Qwen3", "lasttoken", Pooling.LAST),
        ("Qwen3", "cls_token", Pooling.CLS), ("Mistral", "mean_tokens", Pooling.MEAN),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_embeddings_equal_transformers(kind: str, mode: str, pooling: Pooling, device: str, tmp_path: Path) -> None:
    """Prompts of unlike lengths in one batch, of one token and of as many as there are positions, twice: more than a
    step may hold at once, so that decoders' go in chunks, and encoders' never."""
    model = save(kind, tmp_path, [pooled_by(mode), ("Normalize", None)])
    form = read_embedding_form(tmp_path)
    assert form == EmbeddingForm(pooling, normalize=True)
    prompts = [prompt_of(length) for length in (5, 1, LONGEST, 17, 40, 1, 63)] * 2
    core = core_of(tmp_path, LONGEST + 1 if kind not in ("Qwen3", "Mistral") else 30, device)
    for prompt, ours in zip(prompts, embed(core, prompts, form.pooling), strict=True):
        hidden = model(torch.tensor([prompt])).last_hidden_state[0]
        truth = {Pooling.CLS: hidden[0], Pooling.MEAN: hidden.mean(0), Pooling.LAST: hidden[-1]}[pooling]
        if device == "cpu":
            np.testing.assert_allclose(ours, truth.numpy(), rtol=1e-3, atol=1e-4)
        else:  # whose attention multiplies float32 with 11 bits
            assert np.linalg.norm(ours - truth.numpy()) < 0.03 * np.linalg.norm(truth.numpy())


def test_an_encoder_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    save("Bert", tmp_path, [pooled_by("mean_tokens")])
    a = read_architecture(tmp_path)
    assert (a.embeds_only, a.bidirectional, a.max_position_embeddings) == (True, True, LONGEST + 1)
    with pytest.raises(StartupError, match=f"--max-num-batched-tokens 32.*{LONGEST + 1} or more"):
        core_of(tmp_path, budget=32)
    with pytest.raises(InvalidConfigurationError, match=r"encoders \(BertModel\) run on one device"):
        check_divides(a, 2)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    assert read_architecture(tmp_path).max_position_embeddings == 21
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"hidden_act": "gelu_new"}, {"position_embedding_type": "relative_key"}, {"is_decoder": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedModelError, match="architecture BertModel"):
            read_architecture(tmp_path)


def test_decoders_that_look_both_ways_are_refused(tmp_path: Path) -> None:
    save("Qwen3", tmp_path, [pooled_by("lasttoken")])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(UnsupportedModelError, match="attention in both directions"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([pooled_by("max_tokens")], "pooling by pooling_mode_max_tokens"),
        ([("Pooling", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})], "cls_token and pooling"),
        ([pooled_by("mean_tokens"), ("Dense", {})], r"sentence_transformers\.models\.Dense is not supported"),
        ([("Pooling", pooled_by("mean_tokens")[1] | {"include_prompt": False})], "include_prompt"),
    ],
)
def test_steps_that_are_not_computed_are_refused_by_name(modules: list[Any], words: str, tmp_path: Path) -> None:
    save("Bert", tmp_path, modules)
    with pytest.raises(UnsupportedModelError, match=words):
        read_embedding_form(tmp_path)


def test_what_the_files_say(tmp_path: Path) -> None:
    assert read_embedding_form(tmp_path / "file.gguf") == EmbeddingForm()
    save("Bert", tmp_path, [("Pooling", {"pooling_mode": "lasttoken"})])
    assert read_embedding_form(tmp_path) == EmbeddingForm(Pooling.LAST, normalize=False)


@pytest.mark.parametrize(
    ("form", "asked", "words"),
    [
        (EmbeddingForm(), 32, None), (EmbeddingForm(), 16, "no Matryoshka model"),
        (EmbeddingForm(shortens=True), 7, None), (EmbeddingForm(shortens=True), 33, "have 32 numbers"),
        (EmbeddingForm(shortens=True, dimensions=(8, 16)), 16, None),
        (EmbeddingForm(shortens=True, dimensions=(8, 16)), 12, "embeddings of 8, 16 numbers"),
    ],
)  # fmt: skip
def test_dimensions(form: EmbeddingForm, asked: int, words: str | None) -> None:
    if words is None:
        form.check_dimensions(asked, 32)
        return
    with pytest.raises(RequestError, match=words) as refused:
        form.check_dimensions(asked, 32)
    assert refused.value.param == "dimensions"
