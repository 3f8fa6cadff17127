"""The runner on real and tiny models: the same tokens as transformers, however the work is cut into steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.errors import MissingTensorError, ModelNotFoundError, UnexpectedTensorError, UnsupportedModelError
from mainsail_engine.kv.moves import BlockCopy
from mainsail_engine.protocol import TokenLogprobs
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.step import FAILED_TOKEN, Chunk, StepPlan

NEAR_TIE = 1e-3
REFERENCE = Path(__file__).parent / "model/data/smollm2_greedy.json"


def config(path: Path, *, blocks: int = 256, seqs: int = 32, **model) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(path), max_model_len=512, **model),
        cache=CacheConfig(num_blocks=blocks),
        scheduler=SchedulerConfig(max_num_seqs=seqs),
        device="cpu",
    )


class Sequence:
    """A request with blocks of its own, driven by hand."""

    def __init__(self, slot: int, prompt: list[int], blocks: list[int], **params) -> None:
        settings = {"max_tokens": 64, "temperature": 0.0} | params
        self.request = Request(f"r{slot}", prompt, SamplingParams(**settings), 0.0, slot=slot, block_ids=blocks)
        self.done = 0

    def chunk(self, num_tokens: int | None = None) -> Chunk:
        left = self.request.num_tokens - self.done
        count = left if num_tokens is None else min(num_tokens, left)
        chunk = Chunk(self.request, self.done, count, count == left, self.request.slot, self.request.block_ids)
        self.done += count
        return chunk


def run(runner: ModelRunner, sequences: list[Sequence], chunk_size: int | None = None) -> list[int]:
    """One step of all; decodes first, as the scheduler plans."""
    chunks = sorted((s.chunk(chunk_size) for s in sequences), key=lambda c: not (c.num_tokens == 1 and c.samples))
    decodes = sum(1 for c in chunks if c.num_tokens == 1 and c.samples)
    tokens = runner.launch(StepPlan(chunks=chunks, num_decodes=decodes)).result().token_ids
    for chunk, token in zip([c for c in chunks if c.samples], tokens, strict=True):
        chunk.request.output_token_ids.append(token)
    return tokens


def generate(runner: ModelRunner, sequence: Sequence, count: int, chunk_size: int | None = None) -> list[int]:
    while len(sequence.request.output_token_ids) < count:
        run(runner, [sequence], chunk_size)
    return sequence.request.output_token_ids


def poisoned(runner: ModelRunner) -> ModelRunner:
    runner.kv_cache.fill_(float("nan"))
    return runner


def blocks_of(index: int, per_sequence: int = 32) -> list[int]:
    """Blocks of sequence `index`, scattered over the pool."""
    return [(index * per_sequence + i) * 7 % 251 for i in range(per_sequence)]


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> ModelRunner:
    return ModelRunner(config(smollm2, dtype="float32"))


def cases() -> list[dict]:
    return json.loads(REFERENCE.read_text())["cases"]


def first_near_tie(case: dict, gap: float = NEAR_TIE) -> int:
    """How many tokens come before the first that another rounding may change."""
    best = case["top5_logprobs"]
    return next((i for i, (first, second, *_) in enumerate(best) if first - second < gap), len(best))


@pytest.mark.model
@pytest.mark.parametrize("index", range(len(cases())))
def test_greedy_tokens_equal_transformers(smol: ModelRunner, index: int) -> None:
    case = cases()[index]
    count = min(first_near_tie(case), 16)
    sequence = Sequence(0, case["prompt_token_ids"], blocks_of(index % 4))
    assert generate(poisoned(smol), sequence, max(count, 1))[:count] == case["token_ids"][:count]


def forced_logprobs(runner: ModelRunner, case: dict) -> list[TokenLogprobs]:
    """Of every token of transformers' answer and of the five best at its position, the answer given as a prompt."""
    prompt, answer = case["prompt_token_ids"], case["token_ids"]
    sequence = Sequence(0, [*prompt, *answer], blocks_of(0), prompt_logprobs=5)
    result = poisoned(runner).launch(StepPlan(chunks=[sequence.chunk()])).result()
    return (result.extras[0].prompt_logprobs or [])[len(prompt) - 1 :]


@pytest.mark.model
def test_log_probabilities_equal_transformers(smol: ModelRunner) -> None:
    """The answer's tokens and the five best at each position."""
    for case in cases():
        got = forced_logprobs(smol, case)
        assert [entry.token_ids[0] for entry in got] == case["token_ids"]
        for entry, tokens, logprobs in zip(got, case["top5"], case["top5_logprobs"], strict=True):
            assert sorted(entry.logprobs[1:], reverse=True) == pytest.approx(logprobs, abs=2e-3)
            theirs = dict(zip(tokens, logprobs, strict=True))
            ours = dict(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True))
            # Only the last place may be another's, by a near tie.
            assert all(p < logprobs[-1] + 2e-3 for token, p in theirs.items() if token not in ours)
            assert all(ours[token] == pytest.approx(p, abs=2e-3) for token, p in theirs.items() if token in ours)


@pytest.mark.model
def test_compiled_kernels_change_no_token(smollm2: Path, smol: ModelRunner, monkeypatch) -> None:
    """PyTorch's operations are the definition, and what is left where there is no compiler."""
    monkeypatch.setenv("MAINSAIL_CPU_KERNELS", "0")
    plain = ModelRunner(config(smollm2, dtype="float32"))
    for case in cases()[:4]:
        count = min(first_near_tie(case), 16)
        tokens = [
            generate(poisoned(runner), Sequence(0, case["prompt_token_ids"], blocks_of(0)), max(count, 1), 16)[:count]
            for runner in (plain, smol)
        ]
        assert tokens[0] == tokens[1] == case["token_ids"][:count]


@pytest.mark.model
def test_bfloat16_is_near_float32(smollm2: Path) -> None:
    """What the CPU computes in by default where it can: tokens differ at near ties only, log-probabilities little."""
    runner = ModelRunner(config(smollm2, dtype="bfloat16"))
    errors = []
    for case in cases():
        got = [entry.logprobs[0] for entry in forced_logprobs(runner, case)]
        errors += [abs(ours - theirs[0]) for ours, theirs in zip(got, case["top5_logprobs"], strict=True)]
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.3
    for index, case in enumerate(cases()[:8]):
        count = min(first_near_tie(case, gap=0.3), 16)
        sequence = Sequence(0, case["prompt_token_ids"], blocks_of(index % 4))
        assert generate(poisoned(runner), sequence, max(count, 1))[:count] == case["token_ids"][:count]


def tiny_config(kind: str):
    import transformers

    common = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    if kind == "qwen2":
        return transformers.Qwen2Config(**common)
    if kind == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=16)
    if kind == "llama3-rope":
        rope = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        }  # fmt: skip
        return transformers.LlamaConfig(**common, rope_parameters=rope)
    return transformers.LlamaConfig(**common)


@pytest.fixture(scope="module", params=["llama", "llama3-rope", "qwen2", "qwen3"])
def tiny(request, tmp_path_factory):
    """(runner, transformers model) with the same random weights, large enough for distinct logits."""
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return ModelRunner(config(path)), model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def test_tiny_models_equal_transformers(tiny) -> None:
    runner, model = tiny
    for length in (1, 5, 16, 17, 100):
        prompt = prompt_of(length, length)
        assert generate(poisoned(runner), Sequence(0, prompt, blocks_of(0)), 12) == expected(model, prompt, 12)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 33])
def test_chunked_prompts_equal_whole_ones(tiny, chunk_size: int) -> None:
    runner, _ = tiny
    prompt = prompt_of(70)
    whole = generate(poisoned(runner), Sequence(0, prompt, blocks_of(0)), 8)
    assert generate(poisoned(runner), Sequence(1, prompt, blocks_of(1)), 8, chunk_size) == whole


def test_a_mixed_batch_equals_each_alone(tiny) -> None:
    runner, model = tiny
    poisoned(runner)
    sequences = [Sequence(i, prompt_of(3 + 11 * i, i), blocks_of(i, 8)) for i in range(6)]
    run(runner, sequences[:2])
    run(runner, sequences[:4])
    for _ in range(5):
        run(runner, sequences)
    for i, sequence in enumerate(sequences):
        got = sequence.request.output_token_ids
        assert got == expected(model, prompt_of(3 + 11 * i, i), len(got))


def test_a_copied_tail_continues_like_the_original(tiny) -> None:
    """A branch that shares 20 tokens: one full block by reference, four tokens of the next copied."""
    runner, model = tiny
    poisoned(runner)
    first = prompt_of(30)
    generate(runner, Sequence(0, first, [3, 9, 4]), 2)
    branch = Sequence(1, first[:20] + prompt_of(9, 5), [3, 17, 8, 5])
    branch.done = 20
    chunk = branch.chunk()
    plan = StepPlan(chunks=[chunk], copies=[BlockCopy(src=9, dst=17, num_tokens=4)])
    branch.request.output_token_ids += runner.launch(plan).result().token_ids
    assert generate(runner, branch, 6) == expected(model, branch.request.prompt_token_ids, 6)


def test_a_token_on_the_device_is_taken_from_there(tiny) -> None:
    """Step N+1 is planned before N's token is known to the plan: the same tokens come out."""
    runner, model = tiny
    prompt = prompt_of(9)
    sequence = Sequence(2, prompt, blocks_of(0))
    tokens = runner.launch(StepPlan(chunks=[sequence.chunk()])).result().token_ids
    for position in range(9, 14):
        chunk = Chunk(sequence.request, position, 1, True, 2, sequence.request.block_ids)
        tokens += runner.launch(StepPlan(chunks=[chunk], num_decodes=1)).result().token_ids
    assert tokens == expected(model, prompt, 6)


def test_seeded_sampling_does_not_depend_on_the_batch(tiny) -> None:
    runner, _ = tiny
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = generate(poisoned(runner), Sequence(0, prompt_of(12), blocks_of(0), **settings), 10)
    crowd = [Sequence(i, prompt_of(5 + i, i), blocks_of(i, 6), temperature=1.0) for i in range(1, 6)]
    among = Sequence(9, prompt_of(12), blocks_of(7), **settings)
    for _ in range(10):
        run(runner, [*crowd, among])
    assert among.request.output_token_ids == alone
    other = generate(runner, Sequence(0, prompt_of(12), blocks_of(0), **(settings | {"seed": 8})), 10)
    assert other != alone


def test_min_tokens_keeps_the_end_away(tiny) -> None:
    runner, _ = tiny
    free = generate(poisoned(runner), Sequence(0, prompt_of(12), blocks_of(0)), 4)
    stop = (free[0], free[1])
    kept = generate(runner, Sequence(0, prompt_of(12), blocks_of(0), min_tokens=3, stop_token_ids=stop), 4)
    assert not set(stop) & set(kept[:3])


def test_a_row_of_nan_fails_alone(tiny) -> None:
    runner, model = tiny
    good, bad = Sequence(0, prompt_of(20), blocks_of(0)), Sequence(1, prompt_of(20, 3), blocks_of(1))
    run(runner, [good, bad])
    runner.kv_cache[:, bad.request.block_ids[0]] = float("nan")
    tokens = run(runner, [good, bad])
    assert tokens[1] == FAILED_TOKEN
    assert good.request.output_token_ids == expected(model, prompt_of(20), 2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import transformers

    transformers.AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    return tmp_path


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        ModelRunner(config(checkpoint))


def test_an_unexpected_tensor_is_named(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({"model.layers.0.extra": torch.ones(2)}))
    with pytest.raises(UnexpectedTensorError, match=r"model\.layers\.0\.extra"):
        ModelRunner(config(checkpoint))


def test_a_tensor_of_another_shape_is_named(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight has shape \[7\]"):
        ModelRunner(config(checkpoint))


def test_no_model_and_no_known_model(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        ModelRunner(config(tmp_path / "nowhere"))
    other = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["T5Model"]}
    (checkpoint / "config.json").write_text(json.dumps(other))
    with pytest.raises(UnsupportedModelError, match=r"T5Model.*LlamaForCausalLM"):
        ModelRunner(config(checkpoint))


def test_dummy_weights_need_no_tensors(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    runner = ModelRunner(config(checkpoint, load_format="dummy"))
    assert len(generate(runner, Sequence(0, prompt_of(5), blocks_of(0)), 5)) == 5
