"""Where tensors come from: each source gives them by Hugging Face's names, whatever the file format.

    SafetensorsSource   one file or an index; reads no more of a tensor than it is asked for
    GgufSource          dequantized with the package `gguf`, names mapped, what the converter permuted put back
    HeadlessSource      another source, of a model saved without its head, under the names that it has with one
    SplitSource         another source, with tensors that hold several parts shown as those parts (Phi-3)

A *part* is a range of rows and a range of columns: what one rank of several needs of a matrix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mainsail_engine.errors import ModelNotFoundError, UnsupportedModelError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.gguf_codes import Blocks
from mainsail_engine.text.gguf_metadata import read_header

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a part of a tensor lies in one piece: in a file, in bytes."""

    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype


class Source(Protocol):
    names: frozenset[str]
    described: str
    """For messages: the file or folder."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """That part of it, on the CPU, in the checkpoint's dtype; columns are the second dimension's."""
        ...

    def span(self, name: str, rows: slice = ALL) -> Span | None:
        """Where those rows of it are to be read, as they are. None: `tensor` is the only way."""
        ...


def _part(tensor: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    return tensor[rows] if tensor.dim() < 2 else tensor[rows, columns]


class SafetensorsSource:
    """The *.safetensors files of a folder, memory-mapped; an index names the file of each tensor."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.described = str(folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            named: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = sorted({folder / name for name in named.values()})
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelNotFoundError(f"{folder} has no *.safetensors files")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelNotFoundError(f"{folder} lacks {', '.join(missing)}, which its index names")
        self._handles: dict[str, Any] = {}
        self._spans: dict[str, Span] = {}
        try:
            for file in files:
                handle: Any = safe_open(file, framework="pt")
                self._handles |= dict.fromkeys(handle.keys(), handle)
                self._spans |= _spans_of(file)
        except Exception as error:
            raise UnsupportedModelError(f"{folder}: a safetensors file is damaged or cut off ({error})") from error
        self.names = frozenset(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        if rows == ALL and columns == ALL:
            return self._handles[name].get_tensor(name)
        view = self._handles[name].get_slice(name)
        return view[rows] if len(view.get_shape()) < 2 else view[rows, columns]

    def span(self, name: str, rows: slice = ALL) -> Span | None:
        whole, shape = self._spans.get(name), self.shape(name)
        if whole is None or rows == ALL or not shape:
            return whole
        start, stop, step = rows.indices(shape[0])
        if step != 1 or not shape[0]:
            return None
        each = whole.num_bytes // shape[0]
        return Span(whole.file, whole.offset + start * each, max(stop - start, 0) * each, whole.dtype)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip


def _spans_of(file: Path) -> dict[str, Span]:
    """Of every tensor in a safetensors file whose type has a name in _DTYPES (the format: a length, JSON, data)."""
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header: dict[str, Any] = json.loads(data.read(length))
    header.pop("__metadata__", None)
    spans: dict[str, Span] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] in _DTYPES:
            spans[name] = Span(file, 8 + length + begin, end - begin, _DTYPES[entry["dtype"]])
    return spans


_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_GEMMA_LAYER = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def gguf_name(name: str, architecture: str = "LlamaForCausalLM") -> str:
    """Hugging Face's name of a GGUF tensor; an unknown one keeps its own, and is then reported as unexpected."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    layer = {**_GGUF_LAYER, **(_GGUF_GEMMA_LAYER if architecture.startswith("Gemma") else {})}
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in layer:
        return f"model.layers.{parts[1]}.{layer[parts[2]]}.{parts[3]}"
    return name


class GgufSource:
    """One .gguf file. Llama's converter interleaves the two halves of each query and key head: undone here."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        import gguf

        self.described = str(path)
        self._architecture = architecture
        self._dequantize: Callable[..., np.ndarray] = gguf.dequantize
        self._sizes, self._kind = gguf.GGML_QUANT_SIZES, gguf.GGMLQuantizationType
        self._tensors = {gguf_name(t.name, architecture.name): t for t in read_header(path)[1]}
        self._file = np.memmap(path, np.uint8, mode="r")
        self.names = frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        return _part(self._whole(name), rows, columns)

    def span(self, name: str, rows: slice = ALL) -> Span | None:
        del name, rows
        return None

    def _raw(self, name: str) -> tuple[np.ndarray, Any]:
        """(bytes in rows [.., bytes of a row], their type). Raises UnsupportedModelError."""
        tensor = self._tensors[name]
        try:
            kind = self._kind(tensor.type)
        except ValueError as error:
            raise UnsupportedModelError(f"{name}: there is no GGUF type {tensor.type}") from error
        per_block, block_bytes = self._sizes[kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // per_block * block_bytes)
        last = tensor.offset + math.prod(shape)
        if last > len(self._file):
            raise UnsupportedModelError(f"{self.described}: the GGUF file is cut off: {name} ends at byte {last}")
        return self._file[tensor.offset : last].reshape(shape), kind

    def _whole(self, name: str) -> torch.Tensor:
        data, kind = self._raw(name)
        try:
            values = self._dequantize(data, kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{name}: GGUF type {kind.name} is not supported") from error
        return self._reordered(name, _owned(values).float().reshape(self.shape(name)))

    def blocks(self, name: str) -> Blocks:
        """The tensor as it is in the file, rows in our order."""
        data, kind = self._raw(name)
        return Blocks(str(kind.name), self._reordered(name, _owned(data).reshape(self.shape(name)[0], -1)))

    def _reordered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._architecture.name == "LlamaForCausalLM":
            for suffix, heads in (
                ("q_proj", self._architecture.num_heads),
                ("k_proj", self._architecture.num_kv_heads),
            ):
                if f".{suffix}." in name:
                    return _uninterleave(tensor, heads)
        return tensor


def _owned(values: np.ndarray) -> torch.Tensor:
    """Without a copy, unless the array is a view of the file."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())  # pyright: ignore[reportUnknownMemberType]


def _uninterleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [h, d/2, 2] of the converter back to [h, 2, d/2], the order of the rotation by halves."""
    return tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


class HeadlessSource:
    """Puts `model.` before the names."""

    def __init__(self, source: Source) -> None:
        self.described = source.described
        self._source = source
        self._own = {name if name.startswith("model.") else f"model.{name}": name for name in source.names}
        self.names = frozenset(self._own)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._own[name])

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        return self._source.tensor(self._own[name], rows, columns)

    def span(self, name: str, rows: slice = ALL) -> Span | None:
        return self._source.span(self._own[name], rows)


class SplitSource:
    """Shows tensors that hold several parts one below the other under the parts' names."""

    def __init__(self, source: Source, parts: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        """parts: a word of a name, and the words and numbers of rows of the parts that it stands for."""
        self.described = source.described
        self._source = source
        self._whole: dict[str, tuple[str, int, int]] = {}
        names: set[str] = set()
        for name in source.names:
            split = next((word for word in parts if re.search(rf"\b{word}\b", name)), None)
            if split is None:
                names.add(name)
                continue
            first = 0
            for word, rows in parts[split]:
                self._whole[name.replace(split, word)] = (name, first, rows)
                first += rows
        self.names = frozenset(names | self._whole.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._whole:
            return self._source.shape(name)
        whole, first, rows = self._whole[name]
        found = self._source.shape(whole)
        return (min(rows, found[0] - first), *found[1:])

    def tensor(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        if name not in self._whole:
            return self._source.tensor(name, rows, columns)
        whole, first, count = self._whole[name]
        start, stop, _ = rows.indices(count)
        return self._source.tensor(whole, slice(first + start, first + stop), columns)

    def span(self, name: str, rows: slice = ALL) -> Span | None:
        if name not in self._whole:
            return self._source.span(name, rows)
        whole, first, count = self._whole[name]
        start, stop, _ = rows.indices(count)
        return self._source.span(whole, slice(first + start, first + stop))


def open_source(path: Path, architecture: Architecture) -> Source:
    """The checkpoint at a path that read_architecture took."""
    if not path.is_dir():
        return GgufSource(path, architecture)
    source: Source = SafetensorsSource(path)
    if architecture.embeds_only and not architecture.bidirectional:
        source = HeadlessSource(source)
    if architecture.name != "Phi3ForCausalLM":
        return source
    a = architecture
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return SplitSource(
        source,
        {
            "qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
            "gate_up_proj": (("gate_proj", a.intermediate_size), ("up_proj", a.intermediate_size)),
        },
    )
