"""From a checkpoint's tensors to the model's parameters: every tensor there and used, or an error with its name.

`Weights` hands a source's tensors to the model, which asks for each by name; what was asked for and is missing, or is
there and was never asked for, ends the start. Without a source the weights are dummies: random, from the shapes alone.

Matrices (`matrix`, `experts`) come quantized where the checkpoint has them so, or the flag asks for it: then no more
than one of them is ever held in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mainsail_engine.errors import MissingTensorError, UnexpectedTensorError, UnsupportedModelError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.gguf_codes import LAYOUTS, Blocks, codes_of
from mainsail_engine.model.linear import Fp8Weight, Weight
from mainsail_engine.model.quantization import NONE, WORKS, Form, Fp8, Gguf, Int, Mxfp4, Quantization
from mainsail_engine.model.quantized import (
    Share,
    quantize_fp8,
    quantize_int,
    read_fp8,
    read_int,
    stack_rows,
)
from mainsail_engine.model.reader import Reader
from mainsail_engine.model.sources import ALL, GgufSource, Source, open_source

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """What is wanted of a checkpoint's tensor: its name, its whole shape, and the rows and columns of it."""

    name: str
    shape: tuple[int, ...]
    rows: slice = ALL
    columns: slice = ALL

    @property
    def part_shape(self) -> tuple[int, ...]:
        cuts = (self.rows, self.columns)
        return tuple(len(range(*cut.indices(n))) for n, cut in zip(self.shape, cuts, strict=False)) + self.shape[2:]

    @property
    def share(self) -> Share:
        return Share(self.name.removesuffix(".weight"), self.shape, self.rows, self.columns)


class Weights:
    """What a model asks for its parameters. Each lands once on the device, in the model's dtype."""

    def __init__(
        self, source: Source | None, device: torch.device, dtype: torch.dtype, quantization: Quantization = NONE
    ) -> None:
        """source None: dummy weights."""
        self._source, self.quantization = source, quantization
        self._asked: set[str] = set()
        self.device = device
        self.dtype = dtype
        self._random = torch.Generator(device=device).manual_seed(0) if self.is_dummy else None
        self._reader = Reader(device) if source is not None and device.type == "cuda" else None

    @property
    def is_dummy(self) -> bool:
        """Whether random numbers take the place of a checkpoint's."""
        return self._source is None

    def has(self, name: str) -> bool:
        return self._source is not None and name in self._source.names

    def get(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL,
        *, dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """That part of the parameter of that name and (whole) shape. MissingTensorError if it is not there, or has
        another shape."""
        return self.fused([Part(name, shape, rows, columns)], dtype=dtype)

    def fused(self, parts: Sequence[Part], *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Parts of tensors, one below the other, as one parameter."""
        out = self._begin(parts, dtype)
        self._wait()
        return out

    def _begin(self, parts: Sequence[Part], dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `fused`, but it may be filled later: with `_wait`, which `finish` does last."""
        out = self._empty((sum(part.part_shape[0] for part in parts), *parts[0].part_shape[1:]), dtype)
        self._fill_rows(out, parts)
        return out

    def stacked(self, stack: Sequence[Sequence[Part]]) -> torch.Tensor:
        """One `fused` parameter for each member of the stack (each expert), in a new first dimension: filled when
        `finish` returns."""
        rows = sum(part.part_shape[0] for part in stack[0])
        out = self._empty((len(stack), rows, *stack[0][0].part_shape[1:]), None)
        for member, parts in zip(out, stack, strict=True):
            self._fill_rows(member, parts)
        return out

    def scalar(self, name: str, default: float = 1.0) -> float:
        """A number that the checkpoint may have."""
        return float(self.raw(name).float().max()) if self.has(name) else default

    def has_matrix(self, module: str) -> bool:
        """Whether the checkpoint has this module's matrix, in whatever form."""
        return self._source is not None and any(name.startswith(f"{module}.") for name in self._source.names)

    def matrix(self, parts: Sequence[Part], *, at_once: bool = False) -> Weight:
        """Matrices [outputs, inputs], one below the other, as one; quantized as the checkpoint or the flag says.

        One that is not quantized is filled when `finish` returns, so that many are read at a time; at_once: now.
        """
        modules = [part.share.module for part in parts]
        forms = [self.quantization.form(module) for module in modules]
        if any(forms) and self._source is not None:
            return stack_rows([self._read(form, part) for form, part in zip(forms, parts, strict=True)])
        if forms[0] is None and not self.quantization.quantizes(modules[0]) and not at_once:
            return self._begin(parts)
        plain = self.fused(parts)
        if forms[0] is not None:
            return self._quantize(forms[0], plain, modules[0])
        if not self.quantization.quantizes(modules[0]):
            return plain
        return quantize_fp8(plain) if self.quantization.online == "fp8" else quantize_int(plain, modules[0])

    def experts(self, stack: Sequence[Sequence[Part]]) -> torch.Tensor | Fp8Weight:
        """As `matrix` for each member of the stack (each expert), in a new first dimension."""
        form = self.quantization.form(stack[0][0].share.module)
        if isinstance(form, Int | Gguf | Mxfp4) or self.quantization.online == "int4":
            raise UnsupportedModelError(
                f"{stack[0][0].name}: experts in {self.quantization.described} are not supported; experts in FP8 are"
            )
        if form is None and not self.quantization.online:
            return self.stacked(stack)
        members: list[Fp8Weight] = []
        for parts in stack:
            weight = self.matrix(parts)
            if not isinstance(weight, Fp8Weight):
                raise UnsupportedModelError(f"{parts[0].name}: the matrices of experts are not quantized alike")
            members.append(weight)
        return Fp8Weight(torch.stack([m.codes for m in members]), torch.stack([m.scale for m in members]))

    def _read(self, form: Form | None, part: Part) -> Weight:
        if isinstance(form, Fp8):
            return read_fp8(self, form, part.share)
        if isinstance(form, Int):
            return read_int(self, form, part.share)
        if isinstance(form, Gguf) and isinstance(self._source, GgufSource):
            return self._read_gguf(self._source, part)
        return self.fused([part])

    def _read_gguf(self, source: GgufSource, part: Part) -> Weight:
        self._check(source, part)
        kind, data = source.blocks(part.name)
        if kind not in LAYOUTS:
            return self.fused([part])
        layout = LAYOUTS[kind]
        units = part.share.units(1, layout.size, f"a block of {kind}")
        data = data[part.rows, units.start * layout.num_bytes : units.stop * layout.num_bytes]
        return codes_of(Blocks(kind, data.contiguous().to(self.device)))

    def _quantize(self, form: Form, plain: torch.Tensor, module: str) -> Weight:
        """Dummy weights in a checkpoint's form."""
        if isinstance(form, Fp8):
            return quantize_fp8(plain, blocks=form.blocks)
        if isinstance(form, Int):
            return quantize_int(plain, module, bits=form.bits, group=form.group or plain.shape[1])
        return plain

    # -- what quantized.py asks for (its Reader) ------------------------------------------------------------------

    def raw(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """That part of a tensor on the device, in the checkpoint's dtype. Raises MissingTensorError."""
        if self._source is None or name not in self._source.names:
            described = "the checkpoint" if self._source is None else self._source.described
            raise MissingTensorError(
                f"{described} has no tensor {name}, which its quantization ({self.quantization.described}) needs"
            )
        self._asked.add(name)
        return self._source.tensor(name, rows, columns).to(self.device)

    def ignore(self, name: str) -> None:
        """It may be there, and is not used."""
        self._asked.add(name)

    # -- plain tensors --------------------------------------------------------------------------------------------

    def _fill_rows(self, out: torch.Tensor, parts: Sequence[Part]) -> None:
        """Each part in its rows of out, one below the other."""
        first = 0
        for part in parts:
            count = part.part_shape[0]
            self._fill(out[first : first + count], part)
            first += count

    def _wait(self) -> None:
        if self._reader is not None:
            self._reader.wait()

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _fill(self, out: torch.Tensor, part: Part) -> None:
        if self._source is not None:
            self._check(self._source, part)
            whole_rows = part.part_shape[1:] == part.shape[1:]
            span = self._source.span(part.name, part.rows) if whole_rows else None
            if self._reader is None or span is None or not self._reader.read(span, out):
                out.copy_(self._plain(self._source, part, out.dtype))
        elif out.dim() == 1 and part.name.endswith("norm.weight"):
            out.fill_(1.0)
        elif out.dtype == torch.uint8:  # FP4's codes, and powers of two about 1 / 64
            out.fill_(121) if part.name.endswith("_scales") else out.random_(generator=self._random)
        else:
            out.normal_(0.0, 0.02, generator=self._random)

    def _plain(self, source: Source, part: Part, dtype: torch.dtype) -> torch.Tensor:
        tensor = source.tensor(part.name, part.rows, part.columns)
        if tensor.dtype not in PLAIN and tensor.dtype != dtype:
            raise UnsupportedModelError(
                f"{source.described}: {part.name} is {tensor.dtype}, and config.json does not say how it is quantized; "
                f"{WORKS}"
            )
        return tensor

    def _check(self, source: Source, part: Part) -> None:
        self._asked.add(part.name)
        if part.name not in source.names:
            raise MissingTensorError(f"{source.described} has no tensor {part.name}, which the architecture needs")
        shape = source.shape(part.name)
        if shape != part.shape:
            raise MissingTensorError(
                f"{source.described}: {part.name} has shape {list(shape)}, "
                f"the configuration asks for {list(part.shape)}"
            )

    def finish(self, is_ignored: Callable[[str], bool] = lambda name: False) -> None:
        """Raises UnexpectedTensorError if the checkpoint holds tensors that nobody asked for (but the ignored ones)."""
        if self._source is None:
            return
        if self._reader is not None:
            self._reader.wait()
            self._reader.close()
        left = sorted(name for name in self._source.names - self._asked if not is_ignored(name))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UnexpectedTensorError(
                f"{self._source.described} has tensors that the architecture does not: {', '.join(left[:3])}{more}"
            )


def open_weights(
    path: Path,
    architecture: Architecture,
    *,
    dummy: bool,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = NONE,
) -> Weights:
    """The weights at a path that read_architecture took."""
    if quantization.groups and architecture.name == "Phi3ForCausalLM":
        raise UnsupportedModelError(
            f"{path}: a Phi-3 checkpoint quantized beforehand ({quantization.described}) is not supported, because its "
            "fused projections cannot be taken apart; load one that is not, with --quantization fp8 or int4"
        )
    return Weights(None if dummy else open_source(path, architecture), device, dtype, quantization)
