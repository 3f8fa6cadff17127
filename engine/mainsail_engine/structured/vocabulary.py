"""The model's tokens as grammars see them: the bytes of each, and how a text is cut into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mainsail_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tokens: list[bytes]
    """By id, as many as the model has logits; empty where no text contains the token."""
    stop_token_ids: tuple[int, ...]
    """What ends a complete text."""
    encode: Callable[[str], list[int]] | None = None
    """Text in the middle of an answer to token ids. None: nothing is jumped over."""


def vocabulary_of(tokenizer: Tokenizer | None, vocab_size: int, stop_token_ids: Sequence[int]) -> Vocabulary | None:
    """None for a model whose tokens have no bytes: its output cannot be constrained."""
    tokens = None if tokenizer is None else tokenizer.spelled(vocab_size)
    if tokenizer is None or tokens is None:
        return None
    return Vocabulary(tokens, tuple(sorted(stop_token_ids)), tokenizer.encode_inside)
