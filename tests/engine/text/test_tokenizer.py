from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from mainsail_engine.errors import RequestError, UnsupportedModelError
from mainsail_engine.text.detokenizer import TokenBytes, make_detokenizer
from mainsail_engine.text.gguf_metadata import read_metadata
from mainsail_engine.text.gguf_tokenizer import build_tokenizer, merges_from_scores
from mainsail_engine.text.tokenizer import Tokenizer, load_tokenizer

IM_START, IM_END = 1, 2


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    return tokenizer


def test_the_chat_template_of_the_file(smol: Tokenizer) -> None:
    assert smol.template is not None
    text = smol.template.render([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = smol.encode(text, add_special_tokens=False)
    assert ids[0] == IM_START
    assert ids.count(IM_END) == 2


def test_digits_are_split_one_by_one(smol: Tokenizer) -> None:
    ids = smol.encode("1234")
    assert [smol.token_string(token) for token in ids] == ["1", "2", "3", "4"]


def test_words_keep_their_leading_space(smol: Tokenizer) -> None:
    assert [smol.token_string(token) for token in smol.encode("The capital of")] == ["The", "Ġcapital", "Ġof"]


TEXTS = ["héllo 👩‍👩‍👧 日本 12", "a\n\n  b\t", "<|im_end|> in a text", "\u200d", "' don't", "🏳️‍🌈"]


@pytest.mark.parametrize("text", TEXTS)
def test_one_token_at_a_time_is_the_whole(smol: Tokenizer, text: str) -> None:
    ids = smol.encode(text)
    stream = smol.detokenizer(skip_special_tokens=False)
    pieces = [stream.feed([token]) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20))
def test_any_tokens_as_the_library_decodes_them(smollm2: Path, ids: list[int]) -> None:
    global _backend
    _backend = _backend or build_tokenizer(read_metadata(smollm2))
    stream = make_detokenizer(TokenBytes(_backend), skip_special_tokens=True)
    text = "".join(stream.feed([token]) for token in ids) + stream.flush()
    assert text == _backend.decode(ids, skip_special_tokens=True)


_backend: Backend | None = None


def test_special_tokens_are_skipped_on_demand(smol: Tokenizer) -> None:
    ids = smol.encode("a<|im_end|>")
    assert smol.decode(ids, skip_special_tokens=True) == "a"
    assert smol.decode(ids) == "a<|im_end|>"


def test_half_a_character_at_the_end(smol: Tokenizer) -> None:
    first = smol.encode("👧")[0]
    assert smol.decode([first]).endswith("\ufffd")


def test_no_unicode_is_the_clients_error(smol: Tokenizer) -> None:
    with pytest.raises(RequestError, match="Unicode"):
        smol.encode("\ud800", param="prompt")


def test_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UnsupportedModelError, match="not a GGUF"):
        read_metadata(path)


def test_a_cut_off_gguf(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with smollm2.open("rb") as file:
        path.write_bytes(file.read(5000))
    with pytest.raises(UnsupportedModelError, match="cut off"):
        read_metadata(path)


def test_an_unknown_pre_tokenizer_is_refused_by_name() -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "nobody", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(UnsupportedModelError, match="nobody"):
        build_tokenizer(metadata)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -3.0, -2.0, -1.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *([6] * 256), 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_sentencepiece_merges_by_score() -> None:
    backend = build_tokenizer(SPM)
    assert backend.encode("ab a", add_special_tokens=False).tokens == ["▁ab", "▁a"]


def test_sentencepiece_falls_back_to_bytes_and_strips_its_space() -> None:
    backend = build_tokenizer(SPM)
    encoded = backend.encode("ab é", add_special_tokens=False)
    assert encoded.tokens == ["▁ab", "▁", "<0xC3>", "<0xA9>"]
    stream = make_detokenizer(TokenBytes(backend))
    assert [stream.feed([token]) for token in encoded.ids] == ["ab", " ", "", "é"]


def test_merges_are_ranked_best_first() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    assert merges_from_scores(vocab, [0, 0, 0, -2.0, -1.0, -3.0]) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<s>": 0, "hi": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    settings_ = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("HI") == [1]
    assert tokenizer.template is not None
    assert tokenizer.template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    newer = load_tokenizer(tmp_path)
    assert newer is not None
    assert newer.template is not None
    assert newer.template.render([]) == "0"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
