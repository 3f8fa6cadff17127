"""What a checkpoint says about its model, from a config.json or from GGUF metadata.

What all families share is read here; what is a family's own is in `families.py`. Anything that this engine does not
compute (another activation, an unknown rope scaling) is refused by name, instead of being computed wrongly. Nothing
here imports torch, but for a model that only transformers knows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mainsail_engine.errors import ModelNotFoundError, UnsupportedModelError
from mainsail_engine.model.architecture import Activation, Architecture, Rope
from mainsail_engine.model.families import ENCODERS, FAMILIES, decoder_of, refuse
from mainsail_engine.text.gguf_metadata import read_metadata


def read_architecture(path: Path) -> Architecture:
    """Raises ModelNotFoundError when there is no model there, UnsupportedModelError when it is not one of ours."""
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelNotFoundError(f"{path} has no config.json; --model takes a folder with one, or a .gguf file")
        generation, sentences = path / "generation_config.json", path / "sentence_bert_config.json"
        found = from_config(_json(config), _json(generation) if generation.is_file() else {})
        trained = _json(sentences).get("max_seq_length") if found.embeds_only and sentences.is_file() else None
        if not trained:
            return found
        longest = int(trained) + int(found.bidirectional)
        return replace(found, max_position_embeddings=min(found.max_position_embeddings, longest))
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist; --model takes a model folder or a .gguf file")
    return from_gguf(read_metadata(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset({int(value)})  # pyright: ignore[reportUnknownArgumentType]


def from_config(config: dict[str, Any], generation: dict[str, Any]) -> Architecture:
    """From Hugging Face's config.json (version 4 and 5 spellings) and generation_config.json."""
    names: list[str] = config.get("architectures") or []
    if not names:
        raise refuse("a config.json without architectures")
    eos_token_ids = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
    if names[0] in ENCODERS:
        return _encoder(names[0], config)
    name = decoder_of(names[0])
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        raise refuse(f"architecture {names[0]} with attention in both directions")
    family = FAMILIES.get(name)
    if family is None:
        from mainsail_engine.model.generic import architecture_of

        return architecture_of(config, eos_token_ids)
    try:
        common: dict[str, Any] = {
            "name": name,
            "embeds_only": name != names[0],
            **_sizes(config),
            "rms_norm_eps": float(config["rms_norm_eps"]),
            "activation": _activation(config),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "attention_bias": bool(config.get("attention_bias", False)),
            "output_bias": bool(config.get("attention_bias", False)),
            "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            "eos_token_ids": eos_token_ids,
        }
        headless: dict[str, Any] = {"tie_word_embeddings": True} if name != names[0] else {}
        return Architecture(**{**common, **family(config), **headless})
    except KeyError as error:
        raise UnsupportedModelError(f"config.json lacks the field {error}") from error


def _encoder(name: str, config: dict[str, Any]) -> Architecture:
    """BERT's kind: what makes one, and nothing of what makes text."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise refuse(f"architecture {name} with activation {config['hidden_act']}")
    if config.get("position_embedding_type") not in (None, "absolute"):
        raise refuse(f"architecture {name} with {config['position_embedding_type']} positions")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise refuse(f"architecture {name} as a decoder")
    try:
        return Architecture(
            name=name,
            rms_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
            num_token_types=int(config.get("type_vocab_size", 2)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            embeds_only=True,
            bidirectional=True,
            **{**_sizes(config), **ENCODERS[name](config)},
        )
    except KeyError as error:
        raise UnsupportedModelError(f"config.json lacks the field {error}") from error


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return {
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": hidden,
        "intermediate_size": int(config["intermediate_size"]),
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocab_size": int(config["vocab_size"]),
        "max_position_embeddings": int(config["max_position_embeddings"]),
    }


def _activation(config: dict[str, Any]) -> Activation:
    named: dict[str, Activation] = {
        "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh",
    }  # fmt: skip
    name = str(config.get("hidden_activation") or config.get("hidden_act") or "silu")
    if name not in named:
        raise refuse(f"activation {name}")
    return named[name]


_GGUF_NAMES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}  # fmt: skip


def from_gguf(metadata: dict[str, Any]) -> Architecture:
    """From the key-value pairs of a GGUF header. The embedding is tied unless the file has output.weight (loader)."""
    family = str(metadata.get("general.architecture", "?"))
    if family not in _GGUF_NAMES:
        raise refuse(f"GGUF architecture {family}")
    if any(f"{family}.rope.scaling.{key}" in metadata for key in ("type", "factor")):
        kind = metadata.get(f"{family}.rope.scaling.type")
        if kind not in (None, "none"):
            raise refuse(f"GGUF rope scaling {kind!r}")
    try:
        heads = int(metadata[f"{family}.attention.head_count"])
        hidden = int(metadata[f"{family}.embedding_length"])
        vocab = metadata.get(f"{family}.vocab_size") or len(metadata["tokenizer.ggml.tokens"])
        layers = int(metadata[f"{family}.block_count"])
        common: dict[str, Any] = {
            "name": _GGUF_NAMES[family],
            "num_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": int(metadata[f"{family}.feed_forward_length"]),
            "num_heads": heads,
            "num_kv_heads": int(metadata.get(f"{family}.attention.head_count_kv", heads)),
            "head_dim": int(metadata.get(f"{family}.attention.key_length", hidden // heads)),
            "vocab_size": int(vocab),
            "max_position_embeddings": int(metadata[f"{family}.context_length"]),
            "rms_norm_eps": float(metadata[f"{family}.attention.layer_norm_rms_epsilon"]),
            "rope": Rope(theta=float(metadata.get(f"{family}.rope.freq_base", 10000.0))),
            "tie_word_embeddings": True,
            "attention_bias": family == "qwen2",
            "qk_norm": family in ("qwen3", "gemma3"),
            "eos_token_ids": _ids(metadata.get("tokenizer.ggml.eos_token_id")),
            "dtype": "bfloat16",  # its matrices are quantized: float32 would add nothing
        }
        if family == "gemma3":
            common.update(_gguf_gemma3(metadata, hidden, layers))
        return Architecture(**common)
    except KeyError as error:
        raise UnsupportedModelError(f"the GGUF header lacks the key {error}") from error


def _gguf_gemma3(metadata: dict[str, Any], hidden: int, layers: int) -> dict[str, Any]:
    """Every sixth layer sees all; the others a window, with a rotation of their own. Norms come with their 1 added."""
    window = int(metadata["gemma3.attention.sliding_window"])
    return {
        "windows": tuple(0 if (layer + 1) % 6 == 0 else window for layer in range(layers)),
        "local_rope": Rope(theta=10000.0),
        "activation": "gelu_tanh",
        "embedding_scale": hidden**0.5,
    }
