"""xgrammar's C++ library without the Python package around it.

The package imports transformers and torch (half a gigabyte, seconds) for conveniences that are not needed here: the
vocabulary comes from the engine's own tokenizer, masks are numpy arrays. So the library is loaded through the package's
own loader, with the package's `__init__` left out. These are not xgrammar's documented names; the version is pinned.
Calls release the interpreter lock. Everything raises RuntimeError for bad input.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np

RAW = 0
"""Vocabulary type: tokens are the bytes that they stand for."""


class TokenizerInfo(Protocol):
    def vocab_size(self) -> int: ...


class CompiledGrammar(Protocol):
    def memory_size_bytes(self) -> int: ...
    def serialize_json(self) -> str: ...


class Matcher(Protocol):
    def accept_token(self, token: int, debug: bool, /) -> bool: ...
    def fill_next_token_bitmask(self, mask: np.ndarray, row: int, debug: bool, /) -> bool: ...
    def find_jump_forward_string(self) -> str: ...
    def rollback(self, num_tokens: int, /) -> None: ...
    def is_terminated(self) -> bool: ...
    def is_completed(self) -> bool: ...


class BatchMatcher(Protocol):
    def batch_fill_next_token_bitmask(
        self, matchers: Sequence[Matcher], mask: np.ndarray, rows: Sequence[int] | None, debug: bool, /
    ) -> None: ...


@cache
def library() -> Any:
    """The namespace of the library's classes. Loaded once (a quarter of a second)."""
    spec = importlib.util.find_spec("xgrammar")
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("xgrammar is not installed: structured output needs it")
    # tvm_ffi would compile an extension for torch tensors when it is first imported; none is passed here
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    if "xgrammar" not in sys.modules:
        package = ModuleType("xgrammar")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["xgrammar"] = package
    importlib.import_module("xgrammar.load_binding")
    importlib.import_module("xgrammar.exception")
    return importlib.import_module("xgrammar.base")._core


def tokenizer_info(tokens: list[bytes], stop_token_ids: Sequence[int]) -> TokenizerInfo:
    """tokens: the bytes of every id; empty for those that no text contains (control tokens, padding)."""
    return library().TokenizerInfo(tokens, RAW, len(tokens), list(stop_token_ids), False)


def deserialize(text: str, info: TokenizerInfo) -> CompiledGrammar:
    return library().CompiledGrammar.deserialize_json(text, info)


def matcher(compiled: CompiledGrammar) -> Matcher:
    """At the beginning of the grammar. It ends by accepting a stop token, which it allows when the text is complete."""
    return library().GrammarMatcher(compiled, None, False, -1, None)


def batch_matcher(num_threads: int) -> BatchMatcher:
    return library().BatchGrammarMatcher(num_threads)


def mask_words(vocab_size: int) -> int:
    """int32 words of one row's mask."""
    return -(-vocab_size // 32)


def allowed_tokens(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids that a mask [words] int32 allows; bits beyond the vocabulary mean nothing."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size])
