"""What a model is, whatever its checkpoint calls it: one frozen value (`checkpoint_config.py` reads it).

The names are Hugging Face's. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of one kind of layer; `rotary.py` has the formulas and where they come from."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    """The context that the model was trained with before it was stretched."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by this (YaRN, LongRoPE)."""
    long_factor: tuple[float, ...] = ()
    short_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP: Mixtral, Qwen3-MoE, gpt-oss."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalized: bool
    """The chosen experts' weights are made to add up to 1."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that have a plain MLP."""
    swiglu: tuple[float, float] | None = None
    """(alpha, limit) of the clamped activation in place of SiLU, and biases on router and matrices (gpt-oss)."""


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
    rope: Rope = Rope()
    local_rope: Rope | None = None
    """Of layers with a window, where they have one of their own (Gemma 3)."""
    rotary_dim: int = 0
    """Channels of a head that are rotated; 0: all."""
    no_rope_layers: frozenset[int] = frozenset()
    """Layers without any rotation (SmolLM3)."""
    windows: tuple[int, ...] = ()
    """Per layer, how many of the newest tokens it sees; 0: all. Empty: no layer has a window."""
    activation: Activation = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """A bias on attention's output projection; where config.json has attention_bias, all four have one."""
    qk_norm: bool = False
    """RMS norm of every query and key head before the rotation (Qwen3, Gemma 3)."""
    norm_offset: float = 0.0
    """Added to the weights of norms when they are loaded: Gemma stores w - 1."""
    attention_scale: float = 0.0
    """Scores are multiplied by this; 0: 1 / sqrt(head_dim)."""
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What each half of a layer adds is multiplied by this (Granite)."""
    logits_scale: float = 1.0
    """Logits are multiplied by this."""
    experts: Experts | None = None
    dtype: str = "float32"
    """The checkpoint's own."""
    eos_token_ids: frozenset[int] = frozenset()
    embeds_only: bool = False
    """It has no head: it makes embeddings and no text."""
    bidirectional: bool = False
    """Every token sees the whole prompt, which is computed in one step and leaves no KV. max_position_embeddings is one
    more than a prompt may have, since a request ends with a token that is nobody's."""
    position_offset: int = 0
    """The row of the table of positions that belongs to the first token (RoBERTa)."""
    num_token_types: int = 0
    """Rows of BERT's table of token types; all tokens are of the first."""
    generic: bool = False
    """Not one of ours: computed by transformers' modules with our attention (generic.py)."""

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.attention_scale or self.head_dim**-0.5
