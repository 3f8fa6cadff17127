"""Where parts of tensors lie in safetensors files, and that reading them there gives what the library gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mainsail_engine.model.reader import Reader
from mainsail_engine.model.sources import ALL, SafetensorsSource, Span, SplitSource
from mainsail_engine.transfers import PIECE_BYTES


def read(span: Span) -> torch.Tensor:
    data = bytearray(span.file.read_bytes()[span.offset : span.offset + span.num_bytes])
    return torch.frombuffer(data, dtype=span.dtype)


@pytest.fixture
def source(tmp_path: Path) -> SafetensorsSource:
    tensors = {
        "matrix": torch.randn(12, 7).bfloat16(),
        "vector": torch.randn(5),
        "qkv_proj": torch.randn(9, 4),
        "codes": torch.arange(6, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("name", "rows"), [("matrix", ALL), ("matrix", slice(3, 8)), ("vector", ALL), ("vector", slice(1, 3))]
)
def test_a_span_holds_the_part(source: SafetensorsSource, name: str, rows: slice) -> None:
    span = source.span(name, rows)
    assert span is not None
    expected = source.tensor(name, rows)
    assert span.dtype == expected.dtype
    assert torch.equal(read(span), expected.flatten())


def test_types_that_models_do_not_compute_in_have_no_span(source: SafetensorsSource) -> None:
    assert source.span("codes") is None


def test_the_parts_of_a_joined_tensor_have_spans(source: SafetensorsSource) -> None:
    split = SplitSource(source, {"qkv_proj": (("q_proj", 5), ("k_proj", 2), ("v_proj", 2))})
    for name, rows in [("q_proj", ALL), ("k_proj", ALL), ("v_proj", slice(1, 2)), ("q_proj", slice(2, 4))]:
        span = split.span(name, rows)
        assert span is not None
        assert torch.equal(read(span), split.tensor(name, rows).flatten())


@pytest.mark.gpu
def test_reading_to_the_device_in_pieces(tmp_path: Path) -> None:
    matrix = torch.randn(3 * PIECE_BYTES // 4096 + 5, 1024)
    save_file({"matrix": matrix}, tmp_path / "model.safetensors")
    span = SafetensorsSource(tmp_path).span("matrix", slice(1, None))
    assert span is not None
    reader = Reader(torch.device("cuda", 0))
    for _ in range(3):
        out = torch.full((len(matrix) - 1, 1024), 9.0, device="cuda")
        assert reader.read(span, out)
        reader.wait()
        assert torch.equal((out + 1).cpu(), matrix[1:] + 1)
    cut = Span(span.file, span.offset, span.num_bytes + 4096, span.dtype)
    assert reader.read(cut, torch.empty(len(matrix), 1024, device="cuda"))
    with pytest.raises(OSError, match="ends at byte"):
        reader.wait()
    assert not reader.read(span, torch.empty(len(matrix) - 1, 1024, device="cuda", dtype=torch.bfloat16))
    reader.close()
