"""decoder.c for Python: packed matrices, products with them, and all layers of a Llama in one call.

The library is there for float32 on CPUs with AVX-512 and for bfloat16 on those that multiply it without AMX (with AMX
oneDNN has a faster instruction). Elsewhere, without a compiler, or with MAINSAIL_CPU_KERNELS=0 in the environment,
`pack` gives None and the caller does without.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch

from mainsail_kernels._triton import require
from mainsail_kernels.cpu import build

PANEL = 48
HEAD_DIMS: dict[torch.dtype, tuple[int, ...]] = {torch.float32: (16, 32, 64, 128), torch.bfloat16: (32, 64, 128)}
"""That attention is compiled for."""
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("input_norm", "post_norm", "qkv_bias", "q_norm", "k_norm", "cos_sin")),
        *((name, _POINTER) for name in ("qkv", "output", "gate", "up", "down", "kv")),
        ("rotary_dim", _COUNT),
        ("window", _COUNT),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("norm", _POINTER),
        ("layers", _POINTER),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", _COUNT),
        ("table_width", _COUNT),
        *((name, _POINTER) for name in ("positions", "slots", "sequences", "tables", "residual", "qkv")),
        *((name, _POINTER) for name in ("normed", "query", "seen", "inner")),
    ]


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    path = build.library(_NAMES[dtype]) if _supported(dtype) else None
    if path is None:
        return None
    library = ctypes.CDLL(str(path))  # torch's OpenMP runtime is loaded already, and becomes this library's
    library.decoder_pack.argtypes = [_POINTER, _POINTER, _COUNT, _COUNT, _COUNT]
    library.decoder_linear.argtypes = [_POINTER] * 5 + [_COUNT] * 4
    library.decoder_forward.argtypes = [_POINTER, _POINTER, _COUNT]
    return library


def _supported(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return dtype == torch.float32 and torch.cpu._is_avx512_supported()  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [outputs, inputs] as decoder.c reads it."""

    words: torch.Tensor
    """[ceil(outputs / 48), inputs * itemsize / 4, 48] int32."""
    shape: torch.Size
    dtype: torch.dtype


class _Room:
    """Memory for matrices in huge pages: all of it is read every step, and most of a small page's reads miss the TLB.

    Taken from the system in pieces, each given back with the last matrix in it."""

    PIECE = 32 << 20
    LINE = 16
    """Words of a cache line, which every matrix begins with one of."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.int32)

    def take(self, *shape: int) -> torch.Tensor:
        """int32, uninitialized."""
        words = torch.Size(shape).numel()
        if words > self._left.numel():
            self._left = self._piece(max(4 * words, self.PIECE))
        taken, self._left = self._left[:words], self._left[-(-words // self.LINE) * self.LINE :]
        return taken.view(shape)

    def _piece(self, num_bytes: int) -> torch.Tensor:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.int32)


_room = _Room()


def pack(weight: torch.Tensor) -> Panels | None:
    """weight [outputs, inputs] on the CPU. None where there is no library for its type, or a row is no whole words."""
    itemsize = weight.dtype.itemsize
    if weight.dtype not in _NAMES or weight.dim() != 2 or weight.shape[1] * itemsize % 4:
        return None
    library = None if os.environ.get("MAINSAIL_CPU_KERNELS") == "0" else _library(weight.dtype)
    if library is None:
        return None
    outputs, inputs = weight.shape
    words = _room.take(-(-outputs // PANEL), inputs * itemsize // 4, PANEL)
    weight = weight.contiguous()
    library.decoder_pack(weight.data_ptr(), words.data_ptr(), outputs, inputs, torch.get_num_threads())
    return Panels(words, weight.shape, weight.dtype)


def linear(x: torch.Tensor, weight: Panels, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, inputs] times weight transposed, plus bias [outputs]: [n, outputs], rounded once."""
    return _product(x, weight, None, bias)


def gated(x: torch.Tensor, gate: Panels, up: Panels) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) for x [n, inputs], rounded once: [n, outputs]."""
    return _product(x, gate, up, None)


def _product(x: torch.Tensor, weight: Panels, up: Panels | None, bias: torch.Tensor | None) -> torch.Tensor:
    library, (outputs, inputs) = _library(weight.dtype), weight.shape
    require(library is not None and x.dtype == weight.dtype, f"a product of {x.dtype} with {weight.dtype}")
    require(x.dim() == 2 and x.shape[1] == inputs, f"x is {list(x.shape)}, the matrix has {inputs} inputs")
    x, bias = x.contiguous(), None if bias is None else bias.float()
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    assert library is not None
    library.decoder_linear(
        x.data_ptr(), weight.words.data_ptr(), _address(up and up.words), _address(bias), out.data_ptr(),
        x.shape[0], inputs, outputs, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Norms and biases in any type; they are kept in float32."""

    input_norm: torch.Tensor
    qkv: Panels
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cos_sin: torch.Tensor
    """[positions, rotary_dim] float32."""
    output: Panels
    post_norm: torch.Tensor
    gate: Panels
    up: Panels
    down: Panels
    window: int


class Decoder:
    """All layers of a Llama and its last norm, or those of a stage."""

    def __init__(
        self, layers: Sequence[LayerParameters], norm: torch.Tensor | None, *,
        num_heads: int, num_kv_heads: int, head_dim: int, eps: float, scale: float,
    ) -> None:  # fmt: skip
        """norm None: other layers follow elsewhere."""
        self._kept: list[torch.Tensor] = []  # what the structures point at
        self._dtype, self._qkv = layers[0].qkv.dtype, layers[0].qkv.shape[0]
        require(head_dim in HEAD_DIMS[self._dtype], f"no attention is compiled for heads of {head_dim}")
        self._heads = num_heads * head_dim
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        (self._intermediate, self._hidden) = layers[0].gate.shape
        self._model = _Model(
            len(layers), self._hidden, self._intermediate, num_heads, num_kv_heads, head_dim,
            eps, scale, self._wide(norm), ctypes.addressof(self._layers),
        )  # fmt: skip
        self._scratch: list[torch.Tensor] = []
        self._scratch_rows = 0
        self._pool = 0

    def _layer(self, layer: LayerParameters) -> _Layer:
        self._kept.append(layer.cos_sin.contiguous())
        matrices = (layer.qkv, layer.output, layer.gate, layer.up, layer.down)
        self._kept.extend(matrix.words for matrix in matrices)
        vectors = (layer.input_norm, layer.post_norm, layer.qkv_bias, layer.q_norm, layer.k_norm)
        rotation = self._kept[-len(matrices) - 1]
        return _Layer(
            *map(self._wide, vectors), rotation.data_ptr(), *(matrix.words.data_ptr() for matrix in matrices), None,
            rotation.shape[1], layer.window,
        )  # fmt: skip

    def _wide(self, vector: torch.Tensor | None) -> int | None:
        if vector is None:
            return None
        self._kept.append(vector.float().contiguous())
        return self._kept[-1].data_ptr()

    def __call__(
        self, x: torch.Tensor, kv_cache: torch.Tensor, *,
        positions: torch.Tensor, slot_mapping: torch.Tensor, sequences: torch.Tensor, block_tables: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """x [n, hidden] to hidden states after the last norm, or the last layer; writes keys and values to kv_cache.

        kv_cache [num_layers, num_blocks, 2, num_kv_heads, 16, head_dim]; positions and slot_mapping [n] int64;
        sequences [n] int32: whose row of block_tables [num_seqs, blocks] int32 has a token's context.
        """
        library, n = _library(self._dtype), x.shape[0]
        assert library is not None
        require(kv_cache.dtype == self._dtype and kv_cache.is_contiguous(), "the KV cache must be of the model's type")
        self._point_at(kv_cache)
        qkv, query, seen, inner = self._scratch_for(n)
        residual, out = x.to(torch.float32, copy=True), torch.empty(n, self._hidden, dtype=self._dtype)
        inputs = [tensor.contiguous() for tensor in (positions, slot_mapping, sequences, block_tables)]
        step = _Step(
            n, block_tables.shape[1], *(tensor.data_ptr() for tensor in inputs), residual.data_ptr(), qkv.data_ptr(),
            out.data_ptr(), query.data_ptr(), seen.data_ptr(), inner.data_ptr(),
        )  # fmt: skip
        if library.decoder_forward(ctypes.addressof(self._model), ctypes.addressof(step), torch.get_num_threads()):
            raise MemoryError("no memory for a step's bookkeeping")
        return out if self._model.norm else residual.to(self._dtype)

    def _point_at(self, kv_cache: torch.Tensor) -> None:
        if self._pool == kv_cache.data_ptr():
            return
        self._pool = kv_cache.data_ptr()
        for layer, kv in zip(self._layers, kv_cache, strict=True):
            layer.kv = kv.data_ptr()

    def _scratch_for(self, rows: int) -> list[torch.Tensor]:
        if rows > self._scratch_rows:
            widths = ((self._qkv, torch.float32), (self._heads, self._dtype), (self._heads, self._dtype))
            self._scratch_rows = rows
            self._scratch = [
                torch.empty(rows, width, dtype=dtype) for width, dtype in (*widths, (self._intermediate, self._dtype))
            ]
        return self._scratch
