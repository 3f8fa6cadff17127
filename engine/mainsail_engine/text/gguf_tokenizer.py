"""A `tokenizers.Tokenizer` from a GGUF header: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) instead of carrying it. The patterns are those of the models' own
tokenizer.json files; an unknown name is refused, because a wrong split gives slightly wrong tokens without a sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mainsail_engine.errors import UnsupportedModelError

CONTROL, USER_DEFINED = 3, 4
"""Token types of the format."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "olmo", "jina-v2-en"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), _digits_then_gpt2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), lambda: _split(LLAMA3_PATTERN)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), lambda: _split(QWEN2_PATTERN)),
    "tekken": lambda: _split(TEKKEN_PATTERN),
}


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the header describes. Raises UnsupportedModelError for a kind that is not known."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata)
    else:
        raise UnsupportedModelError(f"tokenizer.ggml.model {kind!r} is not supported (gpt2 and llama are)")
    _add_special_tokens(tokenizer, metadata)
    return tokenizer


def _byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"tokenizer.ggml.pre {name!r} is not supported ({known} are)")
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [_split_merge(merge) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece_bpe(metadata: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown: str = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    merges = merges_from_scores(vocab, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip],
    )
    return tokenizer


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whatever pair makes the best-scored piece: the same as a ranked list of all such pairs."""
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocab.items():
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        ranked.extend(
            (-scores[index], vocab[left], vocab[right], (left, right))
            for left, right in pairs
            if left in vocab and right in vocab
        )
    ranked.sort()
    return [pair for *_, pair in ranked]


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]
    plain = [token for token in added if not token.special]
    special = [token for token in added if token.special]
    tokenizer.add_tokens(plain)  # pyright: ignore[reportUnknownMemberType]
    tokenizer.add_special_tokens(special)  # pyright: ignore[reportUnknownMemberType]
