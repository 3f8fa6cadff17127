"""A vocabulary that is small and real, and a compiler of grammars over it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mainsail_engine.structured import bindings
from mainsail_engine.structured.compiler import Compiler
from mainsail_engine.structured.constraint import Constraint
from mainsail_engine.structured.grammar import Grammar
from mainsail_engine.structured.vocabulary import Vocabulary, vocabulary_of
from mainsail_engine.text.tokenizer import load_tokenizer

EOS = 2
"""SmolLM2's <|im_end|>."""


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


class Grammars:
    """Compiles and waits; raises ValueError with what is wrong."""

    def __init__(self, vocabulary: Vocabulary, **limits: Any) -> None:
        self.vocabulary = vocabulary
        self.whole = {token for token, text in enumerate(vocabulary.tokens) if _is_text(text)}
        """Tokens that hold no part of a character."""
        self.compiler = Compiler(lambda: vocabulary, **limits)

    def verdict(self, grammar: Grammar) -> str | None:
        answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.compiler.submit(grammar, answers.put)
        return answers.get(timeout=240)

    def compile(self, grammar: Grammar) -> None:
        error = self.verdict(grammar)
        if error is not None:
            raise ValueError(error)

    def constraint(self, grammar: Grammar, *, jump_forward: bool = False) -> Constraint:
        self.compile(grammar)
        constraint = self.compiler.constraint(grammar, jump_forward=jump_forward)
        assert constraint is not None
        return constraint

    def allowed(self, constraint: Constraint) -> np.ndarray:
        """Token ids that the mask allows."""
        mask = np.zeros((1, -(-len(self.vocabulary.tokens) // 32)), np.int32)
        constraint.matcher.fill_next_token_bitmask(mask, 0, False)
        return bindings.allowed_tokens(mask[0], len(self.vocabulary.tokens))

    def write(self, constraint: Constraint, choose: Callable[[np.ndarray], int], most: int = 400) -> tuple[str, int]:
        """Write a text, choosing among the allowed tokens: (the text, how many tokens were chosen)."""
        tokens, chosen = list(constraint.forced(most, may_end=False)), 0
        while not constraint.ended and len(tokens) < most:
            token = choose(self.allowed(constraint))
            chosen += 1
            assert constraint.accept(token)
            tokens += [token, *constraint.forced(most)]
        assert constraint.ended, "the text did not end"
        return b"".join(self.vocabulary.tokens[token] for token in tokens).decode(), chosen


@pytest.fixture(scope="session")
def vocabulary(smollm2: Path) -> Vocabulary:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    found = vocabulary_of(tokenizer, tokenizer.vocab_size, [EOS])
    assert found is not None
    return found


@pytest.fixture(scope="session")
def grammars(vocabulary: Vocabulary) -> Grammars:
    return Grammars(vocabulary)


@pytest.fixture
def make_grammars(vocabulary: Vocabulary) -> Callable[..., Grammars]:
    """Compilers with other limits, or another vocabulary."""
    return lambda other=None, **limits: Grammars(other or vocabulary, **limits)
