"""What a checkpoint says about its model: one frozen value, from a config.json or from GGUF metadata.

The names are Hugging Face's. Anything that this engine does not compute (another activation, an unknown rope scaling)
is refused here, by name, instead of being computed wrongly. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainsail_engine.errors import ModelNotFoundError, UnsupportedModelError
from mainsail_engine.text.gguf_metadata import read_metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the low frequencies (`rope_type: llama3`); factor 1 is none."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    name: str
    """The class in Hugging Face's config.json, such as LlamaForCausalLM."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMS norm of every query and key head before the rotation (Qwen3)."""
    dtype: str = "float32"
    """The checkpoint's own."""
    eos_token_ids: frozenset[int] = frozenset()


SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_GGUF_NAMES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def read_architecture(path: Path) -> Architecture:
    """Raises ModelNotFoundError when there is no model there, UnsupportedModelError when it is not one of ours."""
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelNotFoundError(f"{path} has no config.json; --model takes a folder with one, or a .gguf file")
        generation = path / "generation_config.json"
        return from_config(_json(config), _json(generation) if generation.is_file() else {})
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist; --model takes a model folder or a .gguf file")
    return from_gguf(read_metadata(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} is not supported; supported architectures: {', '.join(SUPPORTED)}")


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset({int(value)})  # pyright: ignore[reportUnknownArgumentType]


def from_config(config: dict[str, Any], generation: dict[str, Any]) -> Architecture:
    """From Hugging Face's config.json (version 4 and 5 spellings) and generation_config.json."""
    names: list[str] = config.get("architectures") or ["(no architectures in config.json)"]
    if names[0] not in SUPPORTED:
        raise _refuse(f"architecture {names[0]}")
    if config.get("hidden_act", "silu") != "silu":
        raise _refuse(f"activation {config['hidden_act']}")
    if config.get("use_sliding_window"):
        raise _refuse("sliding-window attention (use_sliding_window)")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return Architecture(
            name=names[0],
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=names[0] == "Qwen2ForCausalLM" or bool(config.get("attention_bias", False)),
            qk_norm=names[0] == "Qwen3ForCausalLM",
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            eos_token_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"config.json lacks the field {error}") from error


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeScaling()
    if kind != "llama3":
        raise _refuse(f"rope scaling {kind!r}")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def from_gguf(metadata: dict[str, Any]) -> Architecture:
    """From the key-value pairs of a GGUF header. The embedding is tied unless the file has output.weight (loader)."""
    family = str(metadata.get("general.architecture", "?"))
    if family not in _GGUF_NAMES:
        raise _refuse(f"GGUF architecture {family}")
    if any(f"{family}.rope.scaling.{key}" in metadata for key in ("type", "factor")):
        kind = metadata.get(f"{family}.rope.scaling.type")
        if kind not in (None, "none"):
            raise _refuse(f"GGUF rope scaling {kind!r}")
    try:
        heads = int(metadata[f"{family}.attention.head_count"])
        hidden = int(metadata[f"{family}.embedding_length"])
        vocab = metadata.get(f"{family}.vocab_size") or len(metadata["tokenizer.ggml.tokens"])
        return Architecture(
            name=_GGUF_NAMES[family],
            num_layers=int(metadata[f"{family}.block_count"]),
            hidden_size=hidden,
            intermediate_size=int(metadata[f"{family}.feed_forward_length"]),
            num_heads=heads,
            num_kv_heads=int(metadata.get(f"{family}.attention.head_count_kv", heads)),
            head_dim=int(metadata.get(f"{family}.attention.key_length", hidden // heads)),
            vocab_size=int(vocab),
            max_position_embeddings=int(metadata[f"{family}.context_length"]),
            rms_norm_eps=float(metadata[f"{family}.attention.layer_norm_rms_epsilon"]),
            rope_theta=float(metadata.get(f"{family}.rope.freq_base", 10000.0)),
            tie_word_embeddings=True,
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            dtype="float32",
            eos_token_ids=_ids(metadata.get("tokenizer.ggml.eos_token_id")),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"the GGUF header lacks the key {error}") from error
