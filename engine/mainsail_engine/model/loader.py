"""From a checkpoint's files to the model's parameters: every tensor there and used, or an error with its name.

A *source* gives tensors by Hugging Face's names, whatever the file format: safetensors (one file or an index), GGUF
(dequantized with the package `gguf`, names mapped, the query and key rows of Llama put back into Hugging Face's order),
or dummy (random, from the architecture alone). `Weights` hands them to the model, which asks for each by name; what was
asked for and is missing, or is there and was never asked for, ends the start.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from mainsail_engine.errors import MissingTensorError, ModelNotFoundError, UnexpectedTensorError, UnsupportedModelError
from mainsail_engine.model.architecture import Architecture


class Source(Protocol):
    names: frozenset[str]
    described: str
    """For messages: the file or folder."""

    def tensor(self, name: str) -> torch.Tensor:
        """On the CPU (or any device), in the checkpoint's dtype."""
        ...


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
        try:
            handles = [safe_open(file, framework="pt") for file in files]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        except Exception as error:
            raise UnsupportedModelError(f"{folder}: a safetensors file is damaged or cut off ({error})") from error
        self._handles = {str(key): handle for handle in handles for key in handle.keys()}  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType] # noqa: SIM118
        self.names = frozenset(self._handles)

    def tensor(self, name: str) -> torch.Tensor:
        return self._handles[name].get_tensor(name)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


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
_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def gguf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; an unknown one keeps its own, and is then reported as unexpected."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    return name


class GgufSource:
    """One .gguf file. Llama's converter interleaves the two halves of each query and key head: undone here."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        import gguf

        self.described = str(path)
        self._architecture = architecture
        self._dequantize: Callable[..., object] = gguf.dequantize  # pyright: ignore[reportUnknownMemberType]
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:
            raise UnsupportedModelError(f"{path}: the GGUF file is damaged or cut off ({error})") from error
        self._tensors = {gguf_name(t.name): t for t in reader.tensors}
        self.names = frozenset(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        raw = self._tensors[name]
        try:
            values = self._dequantize(raw.data, raw.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{name}: GGUF type {raw.tensor_type.name} is not supported") from error
        tensor = torch.tensor(values, dtype=torch.float32).reshape([int(n) for n in reversed(raw.shape)])
        if self._architecture.name == "LlamaForCausalLM":
            for suffix, heads in (
                ("q_proj", self._architecture.num_heads),
                ("k_proj", self._architecture.num_kv_heads),
            ):
                if f".{suffix}." in name:
                    return _uninterleave(tensor, heads)
        return tensor


def _uninterleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [h, d/2, 2] of the converter back to [h, 2, d/2], the order of the rotation by halves."""
    return tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


class Weights:
    """What a model asks for its parameters. Each lands once on the device, in the model's dtype."""

    def __init__(self, source: Source | None, device: torch.device, dtype: torch.dtype) -> None:
        """source None: dummy weights."""
        self._source = source
        self._asked: set[str] = set()
        self._device = device
        self._dtype = dtype
        self._random = torch.Generator(device=device).manual_seed(0)

    def has(self, name: str) -> bool:
        return self._source is not None and name in self._source.names

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The parameter of that name and shape. MissingTensorError if it is not there, or has another shape."""
        return self.fused([name], shape, [shape[0]])

    def fused(self, names: list[str], shape: tuple[int, ...], rows: list[int]) -> torch.Tensor:
        """Several tensors with the given numbers of rows, one below the other, as one parameter of that shape."""
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        if self._source is None:
            if len(shape) == 1 and names[0].endswith("norm.weight"):
                return out.fill_(1.0)
            return out.normal_(0.0, 0.02, generator=self._random)
        first = 0
        for name, count in zip(names, rows, strict=True):
            out[first : first + count].copy_(self._checked(self._source, name, (count, *shape[1:])))
            first += count
        return out

    def _checked(self, source: Source, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        self._asked.add(name)
        if name not in source.names:
            raise MissingTensorError(f"{source.described} has no tensor {name}, which the architecture needs")
        tensor = source.tensor(name)
        if tuple(tensor.shape) != shape:
            raise MissingTensorError(
                f"{source.described}: {name} has shape {list(tensor.shape)}, the configuration asks for {list(shape)}"
            )
        return tensor

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """Raises UnexpectedTensorError if the checkpoint holds tensors that nobody asked for (but the ignored ones)."""
        if self._source is None:
            return
        left = sorted(self._source.names - self._asked - ignored)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UnexpectedTensorError(
                f"{self._source.described} has tensors that the architecture does not: {', '.join(left[:3])}{more}"
            )


def open_weights(
    path: Path, architecture: Architecture, *, dummy: bool, device: torch.device, dtype: torch.dtype
) -> Weights:
    """The weights at a path that read_architecture took."""
    if dummy:
        return Weights(None, device, dtype)
    source = SafetensorsSource(path) if path.is_dir() else GgufSource(path, architecture)
    return Weights(source, device, dtype)
