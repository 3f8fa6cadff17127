"""gpt-oss with its experts in MXFP4, as its checkpoints have them: against transformers, which widens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.model.test_families import COMMON, VOCAB, WINDOW, generate, logits, prompt_of, rope, runner_of
from tests.kernels.test_experts_halves import values_of

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig
from mainsail_engine.errors import StartupError
from mainsail_engine.llm import LLM, Prompt, SamplingParams
from mainsail_engine.model import gpt_oss
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.linear import Fp4Experts
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.loader import open_weights
from mainsail_engine.model.mlp import ExpertMlp
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.quantization import read_quantization
from mainsail_engine.model.registry import DECODERS
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_kernels.fp4_tables import Fp4Tables
from mainsail_kernels.reference_quantized import widen_fp4

EXPERTS, CHANNELS, HIDDEN = 4, 96, 64
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": CHANNELS, "head_dim": 16, "sliding_window": WINDOW,
    "num_experts_per_tok": 2, "num_local_experts": EXPERTS, **rope("yarn", truncate=False),
}  # fmt: skip


def save(path: Path) -> Path:
    """A tiny one of random weights, its experts random codes under scales of all sizes that bring no overflow."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GptOssConfig(**COMMON | CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (2.0 if "sinks" in name else 0.2))
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (n, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(119, 126, (n, outputs, inputs // 32), dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    import transformers

    some: Any = transformers
    return some.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager",
        quantization_config=some.Mxfp4Config(dequantize=True),
    ).eval()  # fmt: skip


def experts_of(folder: Path, parallel: Parallel, dtype: torch.dtype = torch.float32) -> ExpertMlp:
    a, device = read_architecture(folder), torch.device("cpu")
    quantization = read_quantization(folder, "auto")
    weights = open_weights(folder, a, dummy=False, device=device, dtype=dtype, quantization=quantization)
    model = DECODERS[a.name](a, weights, max_positions=64, device=device, parallel=parallel)
    mlp = model.layers[1].mlp
    assert isinstance(mlp, ExpertMlp)
    return mlp


def widened(matrix: Any) -> torch.Tensor:
    assert isinstance(matrix, Fp4Experts)
    return widen_fp4(matrix.codes, matrix.scale, torch.bfloat16)


def test_codes_stay_packed_and_mean_what_transformers_makes_of_them(folder: Path) -> None:
    """Bit for bit, in bfloat16, the zeros' signs too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, ours = load_file(folder / "model.safetensors"), experts_of(folder, Parallel())
    at = "model.layers.1.mlp.experts."
    gate_up, down = (
        convert_moe_packed_tensors(tensors[f"{at}{name}_blocks"], tensors[f"{at}{name}_scales"]).transpose(1, 2)
        for name in ("gate_up_proj", "down_proj")
    )
    halves = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=1).contiguous()
    assert torch.equal(widened(ours.gate_up).view(torch.int16), halves.view(torch.int16))
    assert torch.equal(widened(ours.down).view(torch.int16), down.contiguous().view(torch.int16))


def test_tables_where_a_layer_allows_them_mean_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper. Three groups are no whole words of eight dots: a layer of 96 channels stays in the other order."""
    monkeypatch.setattr(gpt_oss, "has_fp8_cores", lambda _: True)
    dtype = torch.bfloat16
    whole, part = experts_of(folder, Parallel(), dtype), experts_of(folder, Parallel(0, 2), dtype)
    for matrix in (whole.gate_up, whole.down):
        assert isinstance(matrix, Fp4Experts)
        assert matrix.factor is None
    monkeypatch.undo()
    plain = experts_of(folder, Parallel(0, 2), dtype)
    for ours, theirs in ((part.gate_up, plain.gate_up), (part.down, plain.down)):
        assert isinstance(ours, Fp4Experts)
        assert ours.factor is not None
        tables = Fp4Tables(ours.codes, ours.scale, ours.factor)
        assert torch.equal(values_of(tables, ours.codes.shape[2] * 8), widened(theirs).double())


def test_ranks_have_whole_groups_of_the_channels(folder: Path) -> None:
    """Three groups over two ranks: 64 and 32 channels, together all of them, the second bias on one rank."""
    whole, parts = experts_of(folder, Parallel()), [experts_of(folder, Parallel(rank, 2)) for rank in range(2)]
    gates, ups = zip(*(widened(part.gate_up).chunk(2, dim=1) for part in parts), strict=True)
    assert [gate.shape[1] for gate in gates] == [64, 32]
    assert torch.equal(torch.cat((*gates, *ups), dim=1), widened(whole.gate_up))
    assert torch.equal(torch.cat([widened(part.down) for part in parts], dim=2), widened(whole.down))
    assert [part.down_bias is None for part in parts] == [False, True]
    x = torch.randn(7, HIDDEN)
    torch.testing.assert_close(parts[0](x) + parts[1](x), whole(x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(folder: Path, theirs: Any) -> None:
    runner = runner_of(folder)
    for length in (1, 17, 150):
        prompt = prompt_of(length)
        truth = theirs(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits(runner, prompt), truth, rtol=2e-4, atol=5e-3)
    prompt = prompt_of(90)
    check_greedy(theirs, prompt, generate(runner, prompt, 12, chunk=37))


def check_greedy(theirs: Any, prompt: list[int], ours: list[int]) -> None:
    """Up to the first near-tie."""
    top = theirs(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1].log_softmax(-1).topk(2)
    for count, (values, indices) in enumerate(zip(top.values, top.indices, strict=True)):
        if values[0] - values[1] < 1e-3:
            break
        assert ours[count] == int(indices[0]), f"token {count} after {len(prompt)}"


@torch.inference_mode()
def test_a_batch_and_a_cached_prefix_give_what_transformers_gives(folder: Path, theirs: Any) -> None:
    """Through the engine: prompts of unlike lengths at once in chunks, then once more from the prefix cache."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    shared = prompt_of(70)
    prompts = [shared + [length] * length for length in (3, 11, 40)] + [prompt_of(5)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    given: list[Prompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    with LLM(str(folder), max_num_seqs=4, max_num_batched_tokens=64, kv_cache_blocks=96, device="cpu") as llm:
        first, second = llm.generate(given, params), llm.generate(given, params)
    for prompt, cold, warm in zip(prompts, first, second, strict=True):
        assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
        check_greedy(theirs, prompt, cold.outputs[0].token_ids)
    assert sum(output.num_cached_tokens for output in second) > 200


def test_dummy_weights_have_the_form_of_the_checkpoint(folder: Path) -> None:
    made = ModelRunner(
        EngineConfig(
            model=ModelConfig(path=str(folder), max_model_len=64, load_format="dummy"),
            cache=CacheConfig(num_blocks=8),
            device="cpu",
        )
    )
    assert isinstance(made._model, LlamaForCausalLM)
    mlp = made._model.layers[0].mlp
    assert isinstance(mlp, ExpertMlp)
    assert isinstance(mlp.gate_up, Fp4Experts)
    assert logits(made, prompt_of(20)).isfinite().all()


def test_other_models_in_mxfp4_are_refused_by_name(tmp_path: Path) -> None:
    import transformers

    some: Any = transformers
    config = some.MixtralConfig(**COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2})
    some.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(StartupError, match="experts in mxfp4 are not supported"):
        runner_of(tmp_path)
