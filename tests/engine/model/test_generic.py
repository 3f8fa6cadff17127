"""Models that this package has no file for: transformers' modules with our attention give what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.model.test_families import (
    COMMON,
    WINDOW,
    assert_close,
    generate,
    logits,
    near_tie,
    on_each_device,
    prompt_of,
    runner_of,
)

from mainsail_engine.errors import MissingTensorError, StartupError
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.model.parallel import check_divides
from mainsail_engine.runner.model_runner import ModelRunner

LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},
    "Cohere": {"logit_scale": 0.3},
    "Cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "GPT2": {},
    "Phi": {"partial_rotary_factor": 0.5},
    "Starcoder2": {"sliding_window": WINDOW},
    "Glm4": {"head_dim": 16},
    "DeepseekV3": LATENT,
    "Olmo3": {"sliding_window": WINDOW},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "Ernie4_5": {},
    "SeedOss": {"head_dim": 16},
    "GraniteSWA": {"sliding_window": WINDOW},
    "Phimoe": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeShared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
}


def save(kind: str, path: Path, **more: Any) -> Any:
    """A model of that kind with random weights in path; transformers' own is returned."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**COMMON | more)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (2.0 if "sinks" in name else 0.2))
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module", params=on_each_device(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, Any]:
    kind, device = request.param
    path = tmp_path_factory.mktemp(kind)
    model = save(kind, path, **KINDS[kind])
    return runner_of(path, device), model


@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(pair: tuple[ModelRunner, Any]) -> None:
    """Tokens up to the first near-tie, with the prompt in chunks that no window divides."""
    runner, model = pair
    assert runner.architecture.generic
    for length in (1, 150):
        prompt = prompt_of(length)
        theirs = model(torch.tensor([prompt])).logits[0]
        assert_close(runner, logits(runner, prompt), theirs)
    prompt = prompt_of(90)
    ours = generate(runner, prompt, 12, chunk=37)
    top = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1].log_softmax(-1).topk(2)
    for count, (values, indices) in enumerate(zip(top.values, top.indices, strict=True)):
        if values[0] - values[1] < near_tie(runner):
            break
        assert ours[count] == int(indices[0]), f"token {count}"


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("StableLm", {}, "StableLmForCausalLM with attention that cannot be replaced"),
        ("Mamba", {"state_size": 8}, "MambaForCausalLM with attention that cannot be replaced"),
        ("Doge", {}, "attention asks for a mask of its own"),
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48}, "OPTForCausalLM .transformers' modules failed: Attrib"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(kind: str, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(kind, tmp_path, **more)
    with pytest.raises(StartupError, match=words):
        runner_of(tmp_path)


def test_an_unknown_architecture_and_remote_code_are_refused(tmp_path: Path) -> None:
    save("Cohere", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"architectures": ["NobodysForCausalLM"]}, {"auto_map": {"AutoModelForCausalLM": "x.Y"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(StartupError, match=r"architecture \w+ is not supported; supported architectures: Llama"):
            read_architecture(tmp_path)


def test_a_missing_tensor_and_several_ranks_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("Cohere", tmp_path)
    with pytest.raises(StartupError, match="CohereForCausalLM is computed by transformers' modules"):
        check_divides(read_architecture(tmp_path), 2)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        runner_of(tmp_path)


def test_attention_that_leads_elsewhere_is_noticed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a model's attention did more than it told its interface."""
    from mainsail_engine.model import generic

    save("Cohere", tmp_path)
    honest = generic._attend

    def scaled(*args: Any, **more: Any) -> Any:
        return honest(*args, **more | {"scaling": 1.0})

    monkeypatch.setattr(generic, "_attend", scaled)
    with pytest.raises(StartupError, match="its attention is not plain"):
        runner_of(tmp_path)


def test_its_weights_sleep_and_wake(tmp_path: Path) -> None:
    from mainsail_engine.runner.sleep import move_tensors

    save("Cohere", tmp_path)
    runner = runner_of(tmp_path)
    before = logits(runner, prompt_of(9))
    moved = move_tensors(runner._model, lambda tensor: tensor.clone())
    assert moved >= (tmp_path / "model.safetensors").stat().st_size * 0.9
    torch.testing.assert_close(logits(runner, prompt_of(9)), before, rtol=0, atol=0)


def test_a_window_that_only_masks_know_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had asked whether attention tells of it. Real windows are wider than what is compared."""
    from mainsail_engine.model import generic

    save("Phimoe", tmp_path, **KINDS["Phimoe"] | {"sliding_window": 300})
    assert read_architecture(tmp_path).windows == (300,) * 4
    runner_of(tmp_path)
    monkeypatch.setattr(generic, "_windows", lambda config, geometry: ())
    with pytest.raises(StartupError, match="its attention is not plain"):
        runner_of(tmp_path)


SMALL = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 24, "sliding_window": WINDOW, "num_key_value_heads": 4}  # fmt: skip
MOST_PARAMETERS = 30_000_000


def small(kind: str, path: Path) -> Any:
    """That model of transformers, small, saved in path. None: it does not come small."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    some: Any = transformers
    try:
        config: Any = CONFIG_MAPPING[kind]
        known = config().to_dict()
        settings = COMMON | {key: value for key, value in SMALL.items() if key in known}
        with torch.device("meta"):
            sizes = [p.numel() for p in some.AutoModelForCausalLM.from_config(config(**settings)).parameters()]
        if sum(sizes) > MOST_PARAMETERS:
            return None
        torch.manual_seed(1)
        model = some.AutoModelForCausalLM.from_config(config(**settings), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(path)
        return some.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception:  # sizes that do not go together, modules that need other packages
        return None


@pytest.mark.slow
@torch.inference_mode()
def test_every_causal_model_of_transformers_is_right_or_refused_by_name(tmp_path: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    right, refused, wrong = list[str](), list[str](), list[str]()
    for kind in sorted(KNOWN):
        if (model := small(kind, tmp_path / kind)) is None:
            continue
        try:
            runner = runner_of(tmp_path / kind)
        except StartupError as error:
            refused.append(f"{type(model).__name__}: {error.message.partition(';')[0]}")
            continue
        rows = [(logits(runner, p), model(torch.tensor([p])).logits[0]) for p in map(prompt_of, (1, 17, 150))]
        apart = max(float(((a - b).norm(dim=1) / b.norm(dim=1)).median()) for a, b in rows)
        (right if apart < 1e-3 else wrong).append(type(model).__name__)
    print(f"{len(right)} right: {', '.join(right)}", *refused, sep="\n")
    assert not wrong
    assert len(right) > 60


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_no_refusal_of_the_model(error: Exception) -> None:
    from mainsail_engine.model.generic import _refusing

    with pytest.raises(type(error)), _refusing("OPTForCausalLM"):
        raise error
