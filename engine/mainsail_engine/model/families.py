"""What each family of models says in its own words in config.json, as the fields of Architecture that it sets.

One function for each family; a family that computes something no other does has a module of its own beside this one
(`registry.py` names it). The meaning of every field is Hugging Face's. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mainsail_engine.errors import UnsupportedModelError
from mainsail_engine.model.architecture import ROPE_KINDS, Experts, Rope

Fields = dict[str, Any]


def rope_of(config: Fields, parameters: Fields | None = None, theta: float = 10000.0) -> Rope:
    """From rope_parameters (version 5), or rope_theta and rope_scaling (version 4)."""
    given: Fields = parameters or config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise refuse(f"rope scaling {kind!r}")
    base = float(given.get("rope_theta") or config.get("rope_theta") or theta)
    longest = int(config["max_position_embeddings"])
    original = int(
        config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    )
    factor = float(given.get("factor") or longest / original)
    return Rope(
        kind=kind,
        theta=base,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(kind, given, factor, original),
        long_factor=tuple(given.get("long_factor") or ()),
        short_factor=tuple(given.get("short_factor") or ()),
    )


def _attention_factor(kind: str, given: Fields, factor: float, original: int) -> float:
    """YaRN (Peng et al., 2023) and LongRoPE (Ding et al., 2024) sharpen attention with the stretch."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(float(given["mscale"])) / mscale(float(given["mscale_all_dim"]))
    return mscale(1.0)


def _rotary_dim(config: Fields) -> int:
    rope: Fields = config.get("rope_parameters") or {}
    part = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    return 0 if part == 1.0 else int(head_dim * part)


def _windows(config: Fields, window: int, kinds: list[str] | None) -> tuple[int, ...]:
    """Per layer: the window of those that layer_types calls sliding; of all where it says nothing."""
    if kinds is None:
        return (window,) * int(config["num_hidden_layers"]) if window else ()
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def llama(config: Fields) -> Fields:
    rope = rope_of(config)
    return {"rope": rope, "rotary_dim": _rotary_dim(config), "max_position_embeddings": _longest(config, rope)}


def _longest(config: Fields, rope: Rope) -> int:
    """The context after stretching: of linear and dynamic scaling, config.json has the one before."""
    given = int(config["max_position_embeddings"])
    stretched = int(rope.original_max_position_embeddings * rope.factor)
    return max(given, stretched) if rope.kind in ("linear", "dynamic", "yarn") else given


def mistral(config: Fields) -> Fields:
    return {**llama(config), "windows": _windows(config, int(config.get("sliding_window") or 0), None)}


def qwen2(config: Fields) -> Fields:
    return {**_qwen(config), "attention_bias": True, "output_bias": False}


def qwen3(config: Fields) -> Fields:
    return {**_qwen(config), "qk_norm": True}


def _qwen(config: Fields) -> Fields:
    """The first max_window_layers layers see all, where use_sliding_window is set."""
    window = int(config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    if not window:
        return llama(config)
    full = int(config.get("max_window_layers", 28))
    layers = range(int(config["num_hidden_layers"]))
    kinds = config.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in layers]
    return {**llama(config), "windows": _windows(config, window, kinds)}


def qwen3_moe(config: Fields) -> Fields:
    step, layers = int(config.get("decoder_sparse_step", 1)), int(config["num_hidden_layers"])
    dense = set(config.get("mlp_only_layers") or ()) | {i for i in range(layers) if (i + 1) % step}
    return {
        **qwen3(config),
        "experts": Experts(
            num_experts=int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
            experts_per_token=int(config["num_experts_per_tok"]),
            intermediate_size=int(config["moe_intermediate_size"]),
            normalized=bool(config.get("norm_topk_prob", False)),
            dense_layers=frozenset(dense),
        ),
    }


def mixtral(config: Fields) -> Fields:
    return {
        **mistral(config),
        "experts": Experts(
            num_experts=int(config["num_local_experts"]),
            experts_per_token=int(config["num_experts_per_tok"]),
            intermediate_size=int(config["intermediate_size"]),
            normalized=True,
        ),
    }


def gpt_oss(config: Fields) -> Fields:
    """Every second layer sees a window; a window's edge does not cost what the sinks hold."""
    layers, window = int(config["num_hidden_layers"]), int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % 2 else "full_attention" for i in range(layers)
    ]
    biased = bool(config.get("attention_bias", True))
    return {
        "rope": rope_of(config, theta=150000.0),
        "windows": _windows(config, window, kinds),
        "attention_bias": biased,
        "output_bias": biased,
        "experts": Experts(
            num_experts=int(config["num_local_experts"]),
            experts_per_token=int(config.get("num_experts_per_tok") or config["experts_per_token"]),
            intermediate_size=int(config["intermediate_size"]),
            normalized=True,
            swiglu=(float(config.get("swiglu_alpha", 1.702)), float(config.get("swiglu_limit", 7.0))),
        ),
    }


def smollm3(config: Fields) -> Fields:
    layers, every = int(config["num_hidden_layers"]), int(config.get("no_rope_layer_interval", 4))
    rotated: list[int] = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    window = int(config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    return {
        **llama(config),
        "no_rope_layers": frozenset(i for i, rope in enumerate(rotated) if not rope),
        "windows": _windows(config, window, config.get("layer_types")) if window else (),
    }


def granite(config: Fields) -> Fields:
    return {
        **llama(config),
        "attention_scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logits_scale": 1.0 / float(config["logits_scaling"]),
    }


def phi3(config: Fields) -> Fields:
    return mistral(config)


def olmo2(config: Fields) -> Fields:
    return llama(config)


def gemma(config: Fields) -> Fields:
    return {
        **llama(config),
        "norm_offset": 1.0,
        "embedding_scale": float(config["hidden_size"]) ** 0.5,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def gemma2(config: Fields) -> Fields:
    """Every second layer sees a window; scores and logits are capped."""
    layers, window = int(config["num_hidden_layers"]), int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % 2 else "full_attention" for i in range(layers)
    ]
    return {
        **gemma(config),
        "windows": _windows(config, window, kinds),
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attention_soft_cap": float(config.get("attn_logit_softcapping") or 0.0),
        "logits_soft_cap": float(config.get("final_logit_softcapping") or 0.0),
    }


def gemma3(config: Fields) -> Fields:
    """Every sixth layer sees all, the others a window with a rotation of their own; heads are normed, not capped."""
    layers, every = int(config["num_hidden_layers"]), int(config.get("sliding_window_pattern", 6))
    kinds = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    rope: Fields = config.get("rope_parameters") or {}
    local = {"rope_theta": float(config.get("rope_local_base_freq", 10000.0))}
    return {
        **gemma2({**config, "layer_types": kinds, "rope_parameters": rope.get("full_attention")}),
        "rope": rope_of(config, rope.get("full_attention") or config.get("rope_scaling"), theta=1e6),
        "local_rope": rope_of(config, rope.get("sliding_attention") or local),
        "qk_norm": True,
    }


FAMILIES: dict[str, Callable[[Fields], Fields]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "MixtralForCausalLM": mixtral,
    "GptOssForCausalLM": gpt_oss,
    "SmolLM3ForCausalLM": smollm3,
    "GraniteForCausalLM": granite,
    "Phi3ForCausalLM": phi3,
    "Olmo2ForCausalLM": olmo2,
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
}


def bert(config: Fields) -> Fields:
    return {"max_position_embeddings": int(config["max_position_embeddings"]) + 1}


def roberta(config: Fields) -> Fields:
    """Positions begin behind the padding token's."""
    offset = int(config.get("pad_token_id", 1)) + 1
    return {"position_offset": offset, "max_position_embeddings": int(config["max_position_embeddings"]) - offset + 1}


ENCODERS: dict[str, Callable[[Fields], Fields]] = {
    "BertModel": bert,
    "RobertaModel": roberta,
    "XLMRobertaModel": roberta,
}


def decoder_of(name: str) -> str:
    """The family of a model without its head (Qwen3Model), whose tensors have no `model.` before their names."""
    whole = f"{name.removesuffix('Model')}ForCausalLM"
    return whole if name.endswith("Model") and whole in FAMILIES else name


def refuse(what: str) -> UnsupportedModelError:
    """The error that names what is missing, and what there is."""
    return UnsupportedModelError(
        f"{what} is not supported; supported architectures: {', '.join((*FAMILIES, *ENCODERS))}, "
        "and others of transformers that have keys and values in every layer"
    )
