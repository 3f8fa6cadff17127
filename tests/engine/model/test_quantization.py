"""Quantized checkpoints: a form means what its codes mean, whole and in a rank's share; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.model import checkpoints
from tests.engine.model.test_families import generate
from tokenizers import Tokenizer, models, pre_tokenizers

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from mainsail_engine.errors import InvalidConfigurationError, StartupError, UnsupportedModelError
from mainsail_engine.kv.moves import BlockCopy, BlockMove
from mainsail_engine.llm import LLM
from mainsail_engine.llm import SamplingParams as LLMParams
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.gguf_codes import LAYOUTS, Blocks, codes_of
from mainsail_engine.model.linear import Fp8Weight, RowsOf, Weight, linear, scaled
from mainsail_engine.model.loader import Part, Weights
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.quantization import from_quantization_config, matches, read_quantization
from mainsail_engine.model.sources import SafetensorsSource
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.runner.sleep import move_tensors
from mainsail_engine.runner.swap import HostMemory, HostSwap
from mainsail_kernels import reference_quantized as reference
from mainsail_kernels.grouped import Codes, dequantize

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def save_plain(folder: Path, kind: str = "Llama", **more: Any) -> Path:
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain"))


def runner_of(
    path: Path, quantization: str = "auto", load_format: str = "auto", kv_cache_dtype: str = "auto", device: str = "cpu"
) -> ModelRunner:
    """In float32; on a GPU in bfloat16, which is what its kernels are for."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(
                path=str(path), dtype=dtype, max_model_len=128, quantization=quantization, load_format=load_format
            ),
            cache=CacheConfig(num_blocks=16, dtype=kv_cache_dtype),
            scheduler=SchedulerConfig(max_num_seqs=4),
            device=device,
            cuda_graphs=False,  # the same arithmetic, and nothing to capture
        )
    )


@torch.inference_mode()
def logits(runner: ModelRunner, n: int = 40) -> torch.Tensor:
    """Of the first n of some tokens: [n, vocab] on the CPU."""
    tokens = torch.randint(3, 96, (128,), generator=torch.Generator().manual_seed(1))[:n].to(runner.device)
    model = model_of(runner)
    with runner.device:
        attention = Attention(
            positions=torch.arange(n), slot_mapping=torch.arange(n),
            block_tables=torch.arange(8, dtype=torch.int32)[None],
            chunk_start=torch.tensor([0, n], dtype=torch.int32), seq_lens=torch.tensor([n], dtype=torch.int32),
            num_decodes=0, max_query_len=n,
        )  # fmt: skip
        return model.logits(model.forward(tokens, attention, runner.kv_cache)).float().cpu()


def model_of(runner: ModelRunner) -> Any:
    return runner._model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_logits_are_those_of_the_numbers_that_the_codes_stand_for(form: str, plain: Path, tmp_path: Path) -> None:
    meant = checkpoints.FORMS[form](plain, tmp_path / "quantized")
    (tmp_path / "meant").mkdir()
    save_file({name: t.contiguous() for name, t in meant.items()}, tmp_path / "meant/model.safetensors")
    (tmp_path / "meant/config.json").write_text((plain / "config.json").read_text())
    runner, truth = runner_of(tmp_path / "quantized"), logits(runner_of(tmp_path / "meant"))
    layer = model_of(runner).layers[1]
    assert isinstance(layer.mlp.down, Fp8Weight if "fp8" in form else Codes)
    # FP8 quantizes what goes in as well; integers are only a way of holding weights.
    assert distance(logits(runner), truth) < (0.12 if "fp8" in form else 1e-5)
    assert distance(logits(runner_of(plain)), truth) > 1e-3, "quantizing made no difference: the test proves nothing"


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of widths that a GPU's kernels have tiles for."""
    return save_plain(tmp_path_factory.mktemp("wider"), hidden_size=256, intermediate_size=512)


def check_on_gpu(ours: ModelRunner, same: ModelRunner, meant: ModelRunner, more: float = 0.0) -> None:
    """By the kernels for one row, for a few and for many, ours is as near to what the CPU computes (same) as bfloat16
    without codes (meant). more: what FP8 may add, which rounds inputs that are a little apart otherwise."""
    truth = logits(same, 120)
    for n in (1, 7, 33, 120):
        rounding = distance(logits(meant, n), truth[:n])
        assert distance(logits(ours, n), truth[:n]) < 2.0 * rounding + 0.01 + more, f"{n} rows; rounding {rounding}"


@pytest.mark.gpu
@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_a_gpu_computes_what_the_cpu_does(form: str, wider: Path, tmp_path: Path) -> None:
    meant = checkpoints.FORMS[form](wider, tmp_path / "quantized")
    (tmp_path / "meant").mkdir()
    save_file({name: t.contiguous() for name, t in meant.items()}, tmp_path / "meant/model.safetensors")
    (tmp_path / "meant/config.json").write_text((wider / "config.json").read_text())
    ours, same = runner_of(tmp_path / "quantized", device="cuda"), runner_of(tmp_path / "quantized")
    check_on_gpu(ours, same, runner_of(tmp_path / "meant", device="cuda"), 0.15 if "fp8" in form else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("quantization", "kv_cache_dtype"), [("fp8", "auto"), ("int4", "auto"), ("fp8", "fp8")])
def test_a_gpu_quantizes_when_it_loads(quantization: str, kv_cache_dtype: str, wider: Path) -> None:
    ours, same = (
        runner_of(wider, quantization, kv_cache_dtype=kv_cache_dtype, device=device) for device in ("cuda", "cpu")
    )
    truth, plain = logits(same, 120), logits(runner_of(wider), 120)
    for n in (1, 7, 33, 120):
        apart, lost = distance(logits(ours, n), truth[:n]), distance(truth[:n], plain[:n])
        assert apart < 0.03 + lost, f"{n} rows: {apart} apart, {lost} lost to quantizing"


def whole(weight: Weight) -> torch.Tensor:
    """[outputs, inputs] float32, whatever the weight is."""
    if isinstance(weight, Fp8Weight):
        widen = reference.widen_blocks if weight.scale.dim() == 2 else reference.widen_rows
        return widen(weight.codes, weight.scale, torch.float32)
    if isinstance(weight, Codes):
        return dequantize(weight, torch.float32)
    if isinstance(weight, RowsOf):
        return torch.cat([whole(part) for part in weight.parts])
    assert isinstance(weight, torch.Tensor), "packed for the CPU's kernels: nothing here reads that back"
    return weight.float()


def weights_of(path: Path) -> Weights:
    return Weights(SafetensorsSource(path), torch.device("cpu"), torch.float32, read_quantization(path, "auto"))


@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_shares_of_ranks_are_parts_of_the_whole(form: str, plain: Path, tmp_path: Path) -> None:
    meant = checkpoints.FORMS[form](plain, tmp_path)
    weights, at = weights_of(tmp_path), "model.layers.0.mlp"
    gate, up, down = (meant[f"{at}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    for rank in range(2):
        ours = Parallel(rank, 2).part(256)
        fused = weights.matrix([Part(f"{at}.{name}_proj.weight", (256, 64), ours) for name in ("gate", "up")])
        torch.testing.assert_close(whole(fused), torch.cat((gate[ours], up[ours])))
        share = weights.matrix([Part(f"{at}.down_proj.weight", (64, 256), columns=ours)])
        torch.testing.assert_close(whole(share), down[:, ours])


@pytest.mark.parametrize(("form", "unit"), [("awq", "a group of 32"), ("fp8 blocks", "a block of 128")])
def test_a_share_that_cuts_a_group_is_refused_by_name(form: str, unit: str, plain: Path, tmp_path: Path) -> None:
    checkpoints.FORMS[form](plain, tmp_path)
    part = Part("model.layers.0.mlp.down_proj.weight", (64, 256), columns=Parallel(1, 16).part(256))
    with pytest.raises(InvalidConfigurationError, match=rf"layers.0.mlp.down_proj: {unit} inputs cannot be cut"):
        weights_of(tmp_path).matrix([part])


def test_quantized_and_plain_parts_of_a_fused_matrix_stay_apart(plain: Path, tmp_path: Path) -> None:
    checkpoints.compressed_int(plain, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.v_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    original = load_file(plain / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    kept = {name: t for name, t in tensors.items() if not name.startswith("model.layers.0.self_attn.v_proj.")}
    save_file(kept | {"model.layers.0.self_attn.v_proj.weight": original}, tmp_path / "model.safetensors")
    qkv = model_of(runner_of(tmp_path)).layers[0].qkv
    assert isinstance(qkv, RowsOf)
    assert torch.equal(whole(qkv)[-32:], original)
    x, bias = torch.randn(3, 64), torch.randn(128)
    torch.testing.assert_close(linear(x, qkv, bias), x @ whole(qkv).T + bias)


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_quantized_when_loaded(quantization: str, plain: Path) -> None:
    runner = runner_of(plain, quantization)
    original = load_file(plain / "model.safetensors")
    layer, most = model_of(runner).layers[1], {"fp8": 0.04, "int4": 0.15}[quantization]
    for name, matrix in (("mlp.down_proj", layer.mlp.down), ("self_attn.o_proj", layer.output)):
        assert 1e-3 < distance(whole(matrix), original[f"model.layers.1.{name}.weight"]) < most
    assert not isinstance(model_of(runner).head, Fp8Weight | Codes | RowsOf)
    assert distance(logits(runner), logits(runner_of(plain))) < {"fp8": 0.15, "int4": 0.5}[quantization]


@pytest.mark.parametrize("blocks", [False, True])
def test_experts_in_fp8(blocks: bool, tmp_path: Path) -> None:
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4}
    folder = save_plain(tmp_path / "plain", "Mixtral", **experts)
    truth = logits(runner_of(folder))
    if blocks:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(config))
        weights = model_of(runner_of(folder, load_format="dummy")).layers[0].mlp.gate_up
        assert weights.codes.shape == (4, 512, 64)
        assert weights.scale.shape == (4, 4, 1)
        return
    runner = runner_of(folder, "fp8")
    assert model_of(runner).layers[0].mlp.gate_up.scale.shape == (4, 512)
    assert distance(logits(runner), truth) < 0.2
    with pytest.raises(UnsupportedModelError, match="experts in int4 are not supported; experts in FP8 are"):
        runner_of(folder, "int4")


@pytest.mark.parametrize("form", ["awq", "compressed fp8", "fp8 blocks"])
def test_dummy_weights_take_the_form_of_the_config(form: str, plain: Path, tmp_path: Path) -> None:
    checkpoints.FORMS[form](plain, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    runner = runner_of(tmp_path, load_format="dummy")
    assert isinstance(model_of(runner).layers[0].mlp.down, Codes if form == "awq" else Fp8Weight)
    assert logits(runner).isfinite().all()


BLOCKS = [i * 5 % 16 for i in range(8)]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2"])
def test_a_cache_in_fp8_gives_nearly_the_same(kind: str, tmp_path: Path) -> None:
    """With soft caps and norms of heads too; chunked, whole and token by token see the same cache."""
    folder = save_plain(tmp_path, kind)
    plain_runner, runner = runner_of(folder), runner_of(folder, kv_cache_dtype="fp8")
    assert runner.kv_cache.dtype == torch.float8_e4m3fn
    assert runner.kv_cache.nbytes * 4 == plain_runner.kv_cache.nbytes
    assert 1e-4 < distance(logits(runner), logits(plain_runner)) < 0.08
    prompt = list(range(3, 50))
    assert generate(runner, prompt, 8, 47, BLOCKS) == generate(runner, prompt, 8, 20, BLOCKS)


def test_scales_of_the_checkpoint_keep_large_keys_and_values_in_range(plain: Path, tmp_path: Path) -> None:
    """Values 2,000 times as large do not fit into e4m3, but for their scale; auto takes FP8 because it is there."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    checkpoints.compressed_fp8(plain, tmp_path, cache=scheme)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        tensors[f"{at}.v_proj.weight_scale"] *= 2000.0
        tensors[f"{at}.o_proj.weight_scale"] /= 2000.0
    save_file(tensors, tmp_path / "model.safetensors")
    clipped = logits(runner_of(tmp_path))
    numbers = {"k_scale": 0.5, "v_scale": 20.0}
    scales = {f"model.layers.{i}.self_attn.{x}": torch.tensor(n) for i in range(2) for x, n in numbers.items()}
    save_file(tensors | scales, tmp_path / "model.safetensors")
    runner = runner_of(tmp_path)
    assert runner.kv_cache.dtype == torch.float8_e4m3fn
    truth = logits(runner_of(plain))
    assert distance(logits(runner), truth) < 0.2 < distance(clipped, truth)


def test_a_cache_in_fp8_goes_to_host_memory_and_back(plain: Path) -> None:
    runner = runner_of(plain, kv_cache_dtype="fp8")
    runner.kv_cache.copy_(torch.randn(runner.kv_cache.shape))
    before = runner.kv_cache.clone()
    memory = HostMemory((2, 2, 2, 16, 16), torch.float8_e4m3fn, 1 << 20)
    swap = HostSwap(runner.kv_cache, memory)
    swap.store([BlockMove(device=3, host=0), BlockMove(device=7, host=1)])
    swap.load([BlockMove(device=5, host=1)])
    assert torch.equal(runner.kv_cache[:, 5].float(), before[:, 7].float())
    runner._copy([BlockCopy(src=3, dst=9, num_tokens=5)])
    after = runner.kv_cache.float()
    assert torch.equal(after[:, 9, :, :, :5], before.float()[:, 3, :, :, :5])
    assert torch.equal(after[:, 9, :, :, 5:], before.float()[:, 9, :, :, 5:])


def test_two_ranks_give_the_tokens_of_one(plain: Path, tmp_path: Path) -> None:
    """Each reads its own groups only, of fused rows and of columns."""
    checkpoints.gptq(plain, tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    greedy = LLMParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    found: list[list[int]] = []
    for ranks in (1, 2):
        settings: dict[str, Any] = {"tensor_parallel_size": ranks, "max_num_seqs": 2, "kv_cache_blocks": 16}
        with LLM(str(tmp_path), dtype="float32", device="cpu", **settings) as llm:
            outputs = llm.generate([{"prompt_token_ids": list(range(3, 40))}], greedy)
        found.append(list(outputs[0].outputs[0].token_ids))
    assert len(found[0]) == 24
    assert found[1] == found[0]


@pytest.mark.parametrize("form", ["awq", "compressed int4", "fp8 blocks"])
def test_a_sleep_finds_every_tensor_of_quantized_matrices(form: str, plain: Path, tmp_path: Path) -> None:
    checkpoints.FORMS[form](plain, tmp_path)
    mlps = [layer.mlp for layer in model_of(runner_of(tmp_path)).layers]
    x = torch.randn(3, 64)
    before = mlps[1](x)
    held = sum(t.nbytes for name, t in load_file(tmp_path / "model.safetensors").items() if ".mlp." in name)
    assert move_tensors(mlps, torch.Tensor.clone) > 0.9 * held
    assert torch.equal(mlps[1](x), before)
    move_tensors(mlps, torch.zeros_like)
    assert not mlps[1](x).any(), "a tensor stayed where it was"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"'bitsandbytes' is not supported; this works: comp"),
    ({"quant_method": "hqq"}, "method 'hqq'"),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "GPTQ with 3 bits"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version gemv"),
    ({"quant_method": "awq", "bits": 4}, "lacks the field 'group_size'"),
    (
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": {
            "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int"}}}},
        "'int-quantized' .int8 weights per channel with quantized activations.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_computed_is_refused_with_what_is(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_quantization_config(config)


def test_activation_order_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    checkpoints.gptq(plain, tmp_path, order="reversed")
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.g_idx: .* activation order \(desc_act\)"):
        runner_of(tmp_path)


def test_flags_that_do_not_go_with_the_checkpoint_are_refused(plain: Path, tmp_path: Path) -> None:
    checkpoints.awq(plain, tmp_path)
    with pytest.raises(InvalidConfigurationError, match=r"--quantization fp8: .* is quantized already \(awq\)"):
        runner_of(tmp_path, "fp8")
    with pytest.raises(InvalidConfigurationError, match=r"is for \.gguf files"):
        runner_of(plain, "gguf")


def test_codes_that_nobody_announced_are_refused(plain: Path, tmp_path: Path) -> None:
    checkpoints.compressed_fp8(plain, tmp_path)
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(
        UnsupportedModelError, match=r"proj.weight is torch.float8_e4m3fn, and config.json does not say"
    ):
        runner_of(tmp_path)


def test_a_missing_scale_is_named(plain: Path, tmp_path: Path) -> None:
    checkpoints.compressed_fp8(plain, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=r"no tensor model.layers.1.mlp.up_proj.weight_scale"):
        runner_of(tmp_path)


def test_names_of_modules_match_as_their_writers_mean() -> None:
    assert matches("lm_head", "lm_head")
    assert matches("mlp.gate", "model.layers.3.mlp.gate")
    assert not matches("mlp.gate", "model.layers.3.mlp.gate_proj")
    assert matches("re:.*o_proj$", "model.layers.3.self_attn.o_proj")
    assert matches("model.layers.3", "model.layers.3.mlp.up_proj")


def test_a_scaled_matrix_means_so_many_times_as_much() -> None:
    weight = torch.randn(64, 256)
    blocks = codes_of(random_blocks("Q4_K", 4, 512))
    for matrix in (
        weight.clone(), Fp8Weight(*reference.quantize_rows(weight)), blocks,
        RowsOf([weight.clone(), codes_of(random_blocks("Q4_1", 4, 256))]),
    ):  # fmt: skip
        before = whole(matrix).clone()
        torch.testing.assert_close(whole(scaled(matrix, 0.22)), before * 0.22)


def random_blocks(kind: str, rows: int, num_in: int) -> Blocks:
    """Random bytes, but for the float16 numbers in them, which are finite."""
    size, num_bytes, _ = LAYOUTS[kind]
    data = np.random.default_rng(3).integers(0, 256, (rows, num_in // size, num_bytes), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in halves:
        some = np.random.default_rng(at).standard_normal((rows, num_in // size, 1)).astype(np.float16)
        data[..., at : at + 2] = some.view(np.uint8)
    return Blocks(kind, torch.from_numpy(data.reshape(rows, -1)))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gguf_types_are_kept_bit_for_bit(kind: str) -> None:
    blocks = random_blocks(kind, 6, 1024)
    truth = gguf.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(dequantize(codes_of(blocks), torch.float32).numpy(), truth)
