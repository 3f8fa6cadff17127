"""A model's tokenizer and chat template, from a Hugging Face folder or from a GGUF file.

Special tokens in a text are recognised everywhere, in a chat template's output and in plain prompts, as the field does
(a template could not work otherwise); whoever must not let users write control tokens filters them before.
Encoding is pure Rust and releases the interpreter lock: the server calls it from threads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend

from mainsail_engine.errors import RequestError, UnsupportedModelError
from mainsail_engine.text.chat_template import ChatTemplate
from mainsail_engine.text.detokenizer import Detokenizer, TokenBytes, make_detokenizer
from mainsail_engine.text.gguf_metadata import read_metadata
from mainsail_engine.text.gguf_tokenizer import build_tokenizer


class Tokenizer:
    """Text to ids and back. `template` is None for a base model."""

    def __init__(
        self, backend: Backend, *, template: ChatTemplate | None, prefix: list[int], suffix: list[int]
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._suffix = suffix
        self._bytes = TokenBytes(backend)
        self.template = template
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids. Raises RequestError for text that is no Unicode (a lone surrogate)."""
        try:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("the text is not valid Unicode", param=param) from error
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True, keep_markers: bool = False) -> Detokenizer:
        """A fresh one for one stream. keep_markers: those special tokens that parsers look for are shown."""
        return make_detokenizer(self._bytes, skip_special_tokens=skip_special_tokens, keep_markers=keep_markers)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes to a text; maybe half a character. Empty for ids that are no token."""
        if self._bytes.kind != "other":
            return self._bytes[token_id]
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def spelled(self, vocab_size: int) -> list[bytes] | None:
        """The bytes of ids 0 .. vocab_size - 1; empty for control tokens and padding. None: tokens have no bytes."""
        known = self._bytes
        if known.kind == "other":
            return None
        return [b"" if known.is_special(i) and not known.is_marker(i) else known[i] for i in range(vocab_size)]

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a piece of text that follows other text: nothing is put before it."""
        if not self._bytes.strips_leading_space:
            return self._backend.encode(text, add_special_tokens=False).ids
        # This kind of tokenizer begins every text with a space: let it be another text's
        anchor = self._backend.encode("\n", add_special_tokens=False).ids
        ids = self._backend.encode("\n" + text, add_special_tokens=False).ids
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else []

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text (an added token, such as a marker)."""
        return self._backend.token_to_id(text)

    def token_string(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The model's tokenizer, or None for a folder without tokenizer.json."""
    if path.is_file():
        return _from_gguf(path)
    return _from_folder(path) if (path / "tokenizer.json").exists() else None


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_metadata(path)
    if "tokenizer.ggml.tokens" not in metadata:
        raise UnsupportedModelError(f"{path} carries no tokenizer (tokenizer.ggml.tokens)")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids: dict[str, int | None] = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    specials = {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
    source = metadata.get("tokenizer.chat_template")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    return Tokenizer(
        build_tokenizer(metadata),
        template=ChatTemplate(source, specials) if source else None,
        prefix=[ids["bos_token"]] if add_bos and ids["bos_token"] is not None else [],
        suffix=[ids["eos_token"]] if add_eos and ids["eos_token"] is not None else [],
    )


def _from_folder(path: Path) -> Tokenizer:
    try:
        backend = Backend.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedModelError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = _read_json(path / "tokenizer_config.json")
    source = _template_source(path, settings)
    template = ChatTemplate(source, _special_tokens(settings)) if source else None
    return Tokenizer(backend, template=template, prefix=[], suffix=[])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … as strings (they may be written as objects)."""
    named = {key: value for key, value in settings.items() if key.endswith("_token") and value}
    texts: dict[str, Any] = {}
    for key, value in named.items():
        texts[key] = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
    return {key: value for key, value in texts.items() if isinstance(value, str)}


def _template_source(path: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja first, then tokenizer_config.json: a text, or a list of named ones (take `default`)."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in cast("list[dict[str, str]]", source)}
        return named.get("default")
    return source
