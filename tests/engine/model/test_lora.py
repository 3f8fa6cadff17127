"""LoRA adapters made by PEFT, against PEFT: alone, many in one batch, over two ranks' shares; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.model.test_families import COMMON, FAMILIES, generate, prompt_of

from mainsail_engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from mainsail_engine.errors import InvalidAdapterError, InvalidConfigurationError
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.lora import AdapterRows, AdapterSlots, module_shapes, read_adapter
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.runner import model_runner
from mainsail_engine.runner.model_runner import ModelRunner
from mainsail_engine.step import Chunk, StepPlan
from mainsail_kernels.lora import tiles_of

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, list[str]] = {
    "Llama": ALL, "Qwen3": ["q_proj", "v_proj", "down_proj"], "Phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "Gemma2": ALL, "Granite": ALL, "Olmo2": ALL, "Mixtral": ATTENTION,
}  # fmt: skip
RANKS = (4, 8)


def base_model(family: str) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(**COMMON | FAMILIES[family])
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_adapter(model: Any, folder: Path, name: str, rank: int, targets: list[str], **more: Any) -> Any:
    """A random adapter in folder / name, as PEFT writes it; the model with it comes back."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **more)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.normal_(0.0, 0.3)
    model.eval().save_pretrained(str(folder), selected_adapters=[name])
    return model


def runner_of(path: Path, max_lora_rank: int = 8) -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model=ModelConfig(path=str(path), max_model_len=256),
            cache=CacheConfig(num_blocks=64),
            scheduler=SchedulerConfig(max_num_seqs=4),
            lora=LoraConfig(max_loras=3, max_lora_rank=max_lora_rank),
            device="cpu",
        )
    )


@pytest.fixture(scope="module", params=TARGETS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, Any]:
    """(a runner with the adapters a and b in slots 0 and 2, PEFT's model with the same)."""
    path = tmp_path_factory.mktemp(request.param)
    model = base_model(request.param)
    model.save_pretrained(path)
    runner = runner_of(path)
    for slot, name, rank in zip((0, 2), "ab", RANKS, strict=True):
        model = save_adapter(model, path, name, rank, TARGETS[request.param], use_rslora=name == "b")
        runner.fill_adapter(slot, runner.read_adapter(name, str(path / name)))
    return runner, model


def answer(runner: ModelRunner, request: Request, count: int) -> None:
    """Decodes alone until the request has so many tokens."""
    done = 0
    while len(request.output_token_ids) < count:
        size = request.num_tokens - done
        plan = StepPlan(chunks=[Chunk(request, done, size, True, request.slot, request.block_ids)])
        plan.num_decodes = int(size == 1)
        request.output_token_ids += runner.launch(plan).result().token_ids
        done += size


def theirs(model: Any, slot: int, prompt: list[int]) -> torch.Tensor:
    if slot < 0:
        with model.disable_adapter():
            return model(torch.tensor([prompt])).logits[0]
    model.set_adapter({0: "a", 2: "b"}[slot])
    return model(torch.tensor([prompt])).logits[0]


@torch.inference_mode()
def test_a_batch_of_many_adapters_equals_peft(served: tuple[ModelRunner, Any]) -> None:
    runner, model = served
    slots, lengths = [2, -1, 0, 2], [3, 20, 17, 33]
    prompts = [prompt_of(length) for length in lengths]
    starts = np.cumsum([0, *lengths])
    first_block = np.cumsum([0, *(-(-length // 16) for length in lengths)])
    tables = torch.zeros(4, 3, dtype=torch.int32)
    for row, length in enumerate(lengths):
        count = -(-length // 16)
        tables[row, :count] = torch.arange(first_block[row], first_block[row] + count)
    positions = torch.cat([torch.arange(length) for length in lengths])
    offsets = torch.from_numpy(np.repeat(first_block[:-1] * 16, lengths))
    rows, tiles = tiles_of(np.repeat(slots, lengths))
    attention = Attention(
        positions=positions, slot_mapping=positions + offsets, block_tables=tables,
        chunk_start=torch.from_numpy(starts.astype(np.int32)), seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_decodes=0, max_query_len=max(lengths),
        adapters=AdapterRows(torch.from_numpy(rows), torch.from_numpy(tiles)),
    )  # fmt: skip
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    ours = runner._model.logits(runner._model.forward(ids, attention, runner.kv_cache))
    for row, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
        torch.testing.assert_close(
            ours[starts[row] : starts[row + 1]], theirs(model, slot, prompt), rtol=2e-4, atol=3e-3
        )


@torch.inference_mode()
def test_greedy_tokens_of_a_mixed_batch_equal_each_alone(
    served: tuple[ModelRunner, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, then decodes, then guesses, through plans as the scheduler makes them."""
    runner, _ = served
    slots = (0, -1, 2)
    requests = [
        Request(str(slot), prompt_of(20 + slot), SamplingParams(max_tokens=8, temperature=0.0), 0.0, slot=row,
                adapter_slot=slot, block_ids=list(range(row * 8, row * 8 + 8)))
        for row, slot in enumerate(slots)
    ]  # fmt: skip
    for start, size in ((0, 13), (13, None)):
        chunks = [Chunk(r, start, size or r.num_tokens - start, size is None, r.slot, r.block_ids) for r in requests]
        result = runner.launch(StepPlan(chunks=chunks)).result()
    for _ in range(8):
        for request, token in zip(requests, result.token_ids, strict=True):
            request.output_token_ids.append(token)
        chunks = [Chunk(r, r.num_tokens - 1, 1, True, r.slot, r.block_ids) for r in requests]
        result = runner.launch(StepPlan(chunks=chunks, num_decodes=3)).result()
    for request in requests:
        alone = Request("alone", request.prompt_token_ids, request.params, 0.0, slot=3,
                        adapter_slot=request.adapter_slot, block_ids=list(range(30, 38)))  # fmt: skip
        answer(runner, alone, 8)
        assert alone.output_token_ids == request.output_token_ids
    assert len({tuple(request.output_token_ids) for request in requests}) == 3, "the adapters change nothing"
    for heads in (0, 1 << 30):  # rows of guesses as chunks and as decodes
        monkeypatch.setattr(model_runner, "SPREAD_HEADS", {"cpu": heads})
        plan, expected = StepPlan(num_verifying=3), list[int]()
        for request in requests:
            first, *guesses = request.output_token_ids[:6]
            begun = replace(request, output_token_ids=[first])
            plan.chunks.append(Chunk(begun, begun.num_tokens - 1, 6, True, begun.slot, begun.block_ids, guesses))
            expected += request.output_token_ids[1:7]
        assert runner.launch(plan).result().token_ids == expected


def test_a_slot_is_used_again_without_a_trace(tmp_path: Path) -> None:
    model = base_model("Llama")
    model.save_pretrained(tmp_path)
    runner, fresh = runner_of(tmp_path), runner_of(tmp_path)
    model = save_adapter(model, tmp_path, "a", 8, ALL)
    save_adapter(model, tmp_path, "b", 4, ["v_proj"])
    runner.fill_adapter(1, runner.read_adapter("a", str(tmp_path / "a")))
    runner.fill_adapter(1, runner.read_adapter("b", str(tmp_path / "b")))
    fresh.fill_adapter(1, fresh.read_adapter("b", str(tmp_path / "b")))
    for ours, expected in zip(runner._adapters.layers, fresh._adapters.layers, strict=True):  # type: ignore[union-attr]
        for name in ours:
            assert torch.equal(ours[name].down[1], expected[name].down[1])
            assert torch.equal(ours[name].up[1], expected[name].up[1])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_the_parts_that_their_matrices_have(size: int, tmp_path: Path) -> None:
    """Outputs split by rank, side by side, and inputs summed, are the whole adapter; 2 KV heads on 4 ranks too."""
    model = base_model("Llama")
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path, "a", 8, ALL)
    a = read_architecture(tmp_path)
    adapter = read_adapter(tmp_path / "a", "a", a)

    def deltas(parallel: Parallel) -> dict[str, torch.Tensor]:
        slots = AdapterSlots(a, parallel, num_slots=1, rank=8, device=torch.device("cpu"), dtype=torch.float32)
        slots.fill(0, adapter)
        site = slots.layers[1]
        return {
            "up": site["gate_up"].up[0, -site["gate_up"].parts[1] :] @ site["gate_up"].down[0, 8:],
            "k": site["qkv"].up[0, site["qkv"].parts[0] :][: site["qkv"].parts[1]] @ site["qkv"].down[0, 8:16],
            "down": site["down"].up[0] @ site["down"].down[0],
        }

    whole = deltas(Parallel())
    ranks = [deltas(Parallel(rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat([rank["up"] for rank in ranks]), whole["up"])
    assert torch.equal(torch.cat([rank["down"] for rank in ranks], dim=1), whole["down"])
    heads = [rank["k"] for rank in ranks][:: max(1, size // a.num_kv_heads)]
    assert torch.equal(torch.cat(heads), whole["k"])


def refused(runner: ModelRunner, folder: Path, words: str) -> None:
    with pytest.raises(InvalidAdapterError, match=words):
        runner.read_adapter("bad", str(folder))


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = base_model("Llama")
    model.save_pretrained(tmp_path)
    runner = runner_of(tmp_path, max_lora_rank=4)
    model = save_adapter(model, tmp_path, "a", 8, ["q_proj"])
    folder = tmp_path / "a"
    refused(runner, tmp_path, "has no adapter_config.json and no adapter_model.safetensors")
    refused(runner, folder, "rank 8; --max-lora-rank is 4")
    runner = runner_of(tmp_path)
    assert runner.read_adapter("a", str(folder)).rank == 8
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    for change in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}):
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        refused(runner, folder, f"{next(iter(change))} .* is not supported")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    first = sorted(tensors)[0]
    odd = "base_model.model.lm_head.lora_A.weight"
    for changed, words in (
        (tensors | {odd: torch.ones(8, 32)}, odd),
        ({key: value for key, value in tensors.items() if key != first}, "do not belong together"),
        ({key: torch.ones(8, 31) if "lora_A" in key else value for key, value in tensors.items()}, r"\[32, 31\]"),
        ({key.replace("layers.0", "layers.9"): value for key, value in tensors.items()}, "layers.9.self_attn.q_proj"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        refused(runner, folder, words)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused(runner, folder, "damaged or cut off")


def test_experts_cannot_be_adapted(tmp_path: Path) -> None:
    base_model("Mixtral").save_pretrained(tmp_path)
    a = read_architecture(tmp_path)
    assert not any(module.startswith("mlp") for module in module_shapes(a, Parallel()))
    at = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    tensors = {f"{at}.lora_A.weight": torch.ones(4, 32), f"{at}.lora_B.weight": torch.ones(48, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with pytest.raises(InvalidAdapterError, match=r"experts\.1\.w1\.lora_A\.weight, which is no factor"):
        read_adapter(tmp_path, "a", a)


@pytest.mark.parametrize(("targets", "words"), [
    (["q_proj", "embed_tokens"], "embed_tokens"), (["q_proj", "lm_head"], "lm_head"),
])  # fmt: skip
def test_embedding_and_head_cannot_be_adapted(targets: list[str], words: str, tmp_path: Path) -> None:
    """As PEFT writes them: refused with the name of the tensor, never left out."""
    model = base_model("Llama")
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path, "a", 4, targets)
    with pytest.raises(InvalidAdapterError, match=words):
        read_adapter(tmp_path / "a", "a", read_architecture(tmp_path))


@torch.inference_mode()
def test_a_rank_of_256_equals_merged_weights(tmp_path: Path) -> None:
    """The adapter beside the base against a checkpoint that it was merged into, both through this engine."""
    model = base_model("Llama")
    model.save_pretrained(tmp_path / "base")
    runner = runner_of(tmp_path / "base", max_lora_rank=256)
    model = save_adapter(model, tmp_path, "a", 256, ALL, use_rslora=True)
    runner.fill_adapter(0, runner.read_adapter("a", str(tmp_path / "a")))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = runner_of(tmp_path / "merged")
    prompt = prompt_of(40)
    request = Request("r", prompt, SamplingParams(max_tokens=10, temperature=0.0, logprobs=0), 0.0, slot=0,
                      adapter_slot=0, block_ids=list(range(16)))  # fmt: skip
    plain = replace(request, adapter_slot=-1, output_token_ids=[])
    for each, engine in ((request, runner), (plain, merged)):
        answer(engine, each, 10)
    assert request.output_token_ids == plain.output_token_ids
    assert request.output_token_ids != generate(runner, prompt, 10, chunk=64), "the adapter changes nothing"


def test_a_model_of_transformers_takes_none(tmp_path: Path) -> None:
    from tests.engine.model.test_generic import save

    save("Cohere", tmp_path)
    with pytest.raises(InvalidConfigurationError, match="--enable-lora: adapters of CohereForCausalLM"):
        runner_of(tmp_path)


def test_greedy_without_adapters_is_the_base_model(served: tuple[ModelRunner, Any]) -> None:
    runner, model = served
    prompt = prompt_of(30)
    ours = generate(runner, prompt, 6, chunk=16)
    with torch.inference_mode():
        for count in range(6):
            top = theirs(model, -1, prompt + ours[:count])[-1].log_softmax(-1).topk(2)
            if top.values[0] - top.values[1] < 1e-3:
                break
            assert ours[count] == int(top.indices[0])
