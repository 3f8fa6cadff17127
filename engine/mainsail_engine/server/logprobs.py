"""Log-probabilities in the three forms that clients know.

Chat: one object for each token. Completions: parallel lists, with each token's offset in the text. prompt_logprobs: for
each prompt position a table from token id to log-probability, rank and text (vLLM's form; the first position has none).
JSON has no infinity: nothing is below LOWEST.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mainsail_engine.protocol import TokenLogprobs
from mainsail_engine.text.tokenizer import Tokenizer

LOWEST = -9999.0


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """How tokens are written. as_ids: "token_id:123" instead of text."""

    tokenizer: Tokenizer | None
    as_ids: bool = False

    def spelled(self, token_id: int) -> bytes:
        return b"" if self.tokenizer is None else self.tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.spelled(token_id).decode(errors="replace")


def _value(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    return {"content": [_chat_entry(entry, texts) for entry in entries]}


def _chat_entry(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    own, *best = [
        {"token": texts.text(token), "logprob": _value(logprob), "bytes": list(texts.spelled(token))}
        for token, logprob in zip(entry.token_ids, entry.logprobs, strict=True)
    ]
    return {**own, "top_logprobs": best}


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """entries belong to token_ids (None: the prompt's first token has no probability); offset: the text before them."""
    offsets: list[int] = []
    for token in token_ids:
        offsets.append(offset)
        offset += len(texts.spelled(token).decode(errors="replace"))
    return {
        "tokens": [texts.text(token) for token in token_ids],
        "token_logprobs": [entry and _value(entry.logprobs[0]) for entry in entries],
        "top_logprobs": [entry and _table(entry, texts) for entry in entries],
        "text_offset": offsets,
    }


def _table(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """The best ones, and the token that is there. Two tokens may be written the same: the better one stays."""
    table: dict[str, float] = {}
    for token, logprob in [*zip(entry.token_ids[1:], entry.logprobs[1:], strict=True)] or [
        (entry.token_ids[0], entry.logprobs[0])
    ]:
        table.setdefault(texts.text(token), _value(logprob))
    table.setdefault(texts.text(entry.token_ids[0]), _value(entry.logprobs[0]))
    return table


def prompt_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> list[dict[str, Any] | None]:
    return [None, *(_ranked(entry, texts) for entry in entries)]


def _ranked(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    own, *best = entry.token_ids
    ranks = {own: entry.rank} | {token: rank for rank, token in enumerate(best, 1) if token != own}
    values = dict(zip(reversed(entry.token_ids), reversed(entry.logprobs), strict=True))
    return {
        str(token): {"logprob": _value(values[token]), "rank": rank, "decoded_token": texts.text(token)}
        for token, rank in ranks.items()
    }
