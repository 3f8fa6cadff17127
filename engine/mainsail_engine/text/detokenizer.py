"""Token ids back to text, one at a time, each in constant time, and never half a character.

Byte-level BPE and SentencePiece with byte fallback both spell every token as bytes. So a token is looked up as bytes,
and an incremental UTF-8 decoder holds back the beginning of a character until its end has come. Bytes that are no
UTF-8 become U+FFFD, as in a decode of the whole. (Decoding a window of tokens twice per step, the usual way, costs
more and depends on how long the window must be.) Other kinds of tokenizers go through `tokenizers`' DecodeStream.
"""

from __future__ import annotations

import codecs
import json
from typing import Protocol

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

MARKERS = frozenset({
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<tool_call>", "</tool_call>", "<think>", "</think>",
    "[THINK]", "[/THINK]",
})  # fmt: skip
"""Special tokens that are part of an answer's text: what tool calls and reasoning are told by."""
HARMONY_MARKERS = frozenset({
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
})  # fmt: skip
"""Of gpt-oss, and markers only in a vocabulary that has them all: some of them end other models' turns."""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """The bytes of every token, looked up once each. `kind`: byte_level, byte_fallback, or other (no byte form)."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        special = {token.content for token in self._added.values() if token.special}
        self._markers = MARKERS | HARMONY_MARKERS if special >= HARMONY_MARKERS else MARKERS
        self._known: dict[int, bytes] = {}
        names = _decoder_names(backend)
        self.kind = "byte_level" if "ByteLevel" in names else "byte_fallback" if "ByteFallback" in names else "other"
        self.strips_leading_space = self.kind == "byte_fallback" and "Strip" in names

    @property
    def backend(self) -> Backend:
        return self._backend

    def is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.special

    def is_marker(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.content in self._markers

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        return _byte_level(piece) if self.kind == "byte_level" else _byte_fallback(piece)


def _decoder_names(backend: Backend) -> set[str]:
    """The types in the decoder, also inside a sequence (its pickled state is its JSON)."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    parts = state.get("decoders", [state])
    return {part["type"] for part in parts}


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in piece)
    except KeyError:
        return piece.encode()


def _byte_fallback(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


class Detokenizer(Protocol):
    """Text of one stream of tokens."""

    def feed(self, token_ids: list[int]) -> str:
        """Text that these tokens complete."""
        ...

    def flush(self) -> str:
        """The end: half a character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """Through the tokens' bytes: constant time per token."""

    def __init__(
        self, token_bytes: TokenBytes, *, skip_special_tokens: bool = True, keep_markers: bool = False
    ) -> None:
        self._bytes = token_bytes
        self._skip, self._keep = skip_special_tokens, keep_markers
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = token_bytes.strips_leading_space

    def feed(self, token_ids: list[int]) -> str:
        spelled = b"".join(self._bytes[token] for token in token_ids if not self._is_hidden(token))
        return self._strip(self._decoder.decode(spelled))

    def _is_hidden(self, token: int) -> bool:
        return self._skip and self._bytes.is_special(token) and not (self._keep and self._bytes.is_marker(token))

    def flush(self) -> str:
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(" ")


class StreamDetokenizer:
    """Through the library's own stream, for tokenizers without a byte form (WordPiece, Metaspace)."""

    def __init__(self, backend: Backend, *, skip_special_tokens: bool = True) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def feed(self, token_ids: list[int]) -> str:
        return "".join(self._stream.step(self._backend, token) or "" for token in token_ids)

    def flush(self) -> str:
        return ""


class NoText:
    """Of a model without a tokenizer (random weights for load tests): tokens have no text."""

    def feed(self, token_ids: list[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_detokenizer(
    token_bytes: TokenBytes, *, skip_special_tokens: bool = True, keep_markers: bool = False
) -> Detokenizer:
    if token_bytes.kind == "other":
        return StreamDetokenizer(token_bytes.backend, skip_special_tokens=skip_special_tokens and not keep_markers)
    return ByteDetokenizer(token_bytes, skip_special_tokens=skip_special_tokens, keep_markers=keep_markers)
