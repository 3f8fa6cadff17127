"""BERT and RoBERTa (BGE, E5, MiniLM and their kind): encoders, which make embeddings and no text.

Every token sees its whole prompt, so a prompt is one chunk (the scheduler's `whole_prompts`), nothing of it is kept for
later, and the KV pool has no bytes. The prompts of a step lie side by side with a row of padding for each token that
they are shorter than the longest:

    rows of the step  [ a a a | b b b b b | c ]      attention's batch   a a a . .      one product for all of them;
                                                                         b b b b b      padding is seen by nobody
                                                                         c . . . .

Norms come after what they norm, with means and biases (Devlin et al., "BERT", 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mainsail_engine.errors import UnsupportedModelError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.linear import Weight, linear, packed
from mainsail_engine.model.loader import Part, Weights
from mainsail_engine.model.parallel import SINGLE, Parallel

UNUSED = frozenset({"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"})
"""Tensors that checkpoints carry and that no embedding is made of."""


@dataclass(slots=True)
class Norm:
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class Dense:
    weight: Weight
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(slots=True)
class Layer:
    qkv: Dense
    output: Dense
    attention_norm: Norm
    up: Dense
    down: Dense
    norm: Norm


@dataclass(slots=True)
class Batch:
    """The prompts of a step as rows of a batch; made once, used by every layer."""

    places: torch.Tensor
    """[n, longest] int64: which row of the step is there."""
    seen: torch.Tensor
    """[n, 1, 1, longest] bool: not padding."""
    of_token: torch.Tensor
    """[num_tokens] int64: where in [n * longest] a row of the step is."""
    inside: torch.Tensor
    """[num_tokens, 1] bool: whether it is anywhere. Other rows are prompts of one token, or a padded step's."""


class BertModel:
    captures_graphs = False
    reads_transposed_values = False

    def __init__(
        self, architecture: Architecture, weights: Weights, *, max_positions: int, device: torch.device,
        parallel: Parallel = SINGLE,
    ) -> None:  # fmt: skip
        """Takes its parameters from `weights` and leaves none behind. Raises as Weights does."""
        del max_positions, device
        a = architecture
        self.architecture, self.parallel = a, parallel
        self.num_heads = self.num_kv_heads = a.num_heads
        hidden, positions = a.hidden_size, a.max_position_embeddings - 1 + a.position_offset
        if not weights.is_dummy:
            self._check(weights)
        self.words = weights.get("embeddings.word_embeddings.weight", (a.vocab_size, hidden))
        places = weights.get("embeddings.position_embeddings.weight", (positions, hidden))
        types = weights.get("embeddings.token_type_embeddings.weight", (a.num_token_types, hidden))
        self.places = places[a.position_offset :] + types[0]
        self.norm = self._norm(weights, "embeddings.LayerNorm")
        self.layers = [self._layer(index, weights) for index in range(a.num_layers)]
        weights.finish(UNUSED.__contains__)

    def _check(self, weights: Weights) -> None:
        if not weights.has("embeddings.word_embeddings.weight"):
            raise UnsupportedModelError(
                f"{self.architecture.name}: its tensors are not the encoder's alone (embeddings.word_embeddings.weight "
                "is missing); save the model without its head"
            )

    def _norm(self, weights: Weights, at: str) -> Norm:
        size = (self.architecture.hidden_size,)
        return Norm(weights.get(f"{at}.weight", size), weights.get(f"{at}.bias", size), self.architecture.rms_norm_eps)

    def _dense(self, weights: Weights, names: list[str], outputs: int, inputs: int) -> Dense:
        matrix = weights.matrix([Part(f"{name}.weight", (outputs, inputs)) for name in names])
        return Dense(packed(matrix), weights.fused([Part(f"{name}.bias", (outputs,)) for name in names]))

    def _layer(self, index: int, weights: Weights) -> Layer:
        a, at = self.architecture, f"encoder.layer.{index}"
        hidden, wide = a.hidden_size, a.intermediate_size
        heads = [f"{at}.attention.self.{name}" for name in ("query", "key", "value")]
        return Layer(
            qkv=self._dense(weights, heads, hidden, hidden),
            output=self._dense(weights, [f"{at}.attention.output.dense"], hidden, hidden),
            attention_norm=self._norm(weights, f"{at}.attention.output.LayerNorm"),
            up=self._dense(weights, [f"{at}.intermediate.dense"], wide, hidden),
            down=self._dense(weights, [f"{at}.output.dense"], hidden, wide),
            norm=self._norm(weights, f"{at}.output.LayerNorm"),
        )

    def forward(self, token_ids: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states of the last layer, [num_wanted, hidden_size]. Every chunk is a whole prompt; kv_cache is empty.

        token_ids [num_tokens] int64.
        """
        del kv_cache
        x = self.norm(self.words[token_ids] + self.places[attention.positions])
        batch = batch_of(attention, len(token_ids))
        for layer in self.layers:
            x = layer.attention_norm(x + layer.output(self._attend(layer.qkv(x), batch)))
            x = layer.norm(x + layer.down(F.gelu(layer.up(x))))
        return attention.only_wanted(x)

    def _attend(self, qkv: torch.Tensor, batch: Batch | None) -> torch.Tensor:
        """[num_tokens, 3 * hidden_size] to [num_tokens, hidden_size]."""
        alone = qkv[:, 2 * self.architecture.hidden_size :]  # a token that sees itself only takes its own value
        if batch is None:
            return alone
        n, longest = batch.places.shape
        heads = qkv[batch.places].view(n, longest, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=batch.seen)
        rows = mixed.transpose(1, 2).reshape(n * longest, -1)
        return torch.where(batch.inside, rows[batch.of_token], alone)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, vocab_size] of zeros: there is no head, and the token that ends an embedding's request is nobody's."""
        return hidden.new_zeros((hidden.shape[0], self.architecture.vocab_size))


def batch_of(attention: Attention, num_tokens: int) -> Batch | None:
    """None: all prompts of the step have one token. Waits for nothing on the device."""
    starts, device = attention.chunk_start.long(), attention.positions.device
    n, longest = starts.shape[0] - 1, attention.max_query_len
    if n <= 0:
        return None
    lengths = starts.diff()
    offset = torch.arange(longest, device=device)
    token = torch.arange(num_tokens, device=device)
    places = (starts[:-1, None] + offset).clamp(max=num_tokens - 1)
    chunk = torch.searchsorted(starts[1:].contiguous(), token, right=True).clamp(max=n - 1)
    inside = (token >= starts[0]) & (token < starts[-1])
    of_token = (chunk * longest + token - starts[chunk]).clamp(0, n * longest - 1)
    # A chunk of no tokens sees its first place, so that no row of weights is empty.
    seen = offset < lengths.clamp(min=1)[:, None]
    return Batch(places, seen[:, None, None, :], of_token, inside[:, None])
