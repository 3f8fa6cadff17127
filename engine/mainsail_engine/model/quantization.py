"""Which of a model's matrices are quantized, and how: read from the flag and the checkpoint's own words.

A checkpoint says so in config.json (`quantization_config`); --quantization asks for it of one that is not. What this
engine does not compute is refused with what it does, instead of being loaded wrongly. Nothing here imports torch.

    checkpoint                                    form
    compressed-tensors `float-quantized`          Fp8 (per tensor, per output, or 128 x 128 blocks)
    compressed-tensors `pack-quantized`           Int (4 or 8 bits in groups, or one group a row)
    fp8 (Hugging Face, DeepSeek, Qwen)            Fp8: 128 x 128 blocks, or per tensor
    awq, gptq                                     Int
    mxfp4 (gpt-oss)                               Mxfp4: the experts' matrices alone
    a .gguf file, with --quantization gguf        Gguf: what its types say, tensor by tensor
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mainsail_engine.errors import InvalidConfigurationError, UnsupportedModelError

WORKS = (
    "this works: compressed-tensors (FP8 weights per tensor, per output or in 128 x 128 blocks; INT4 and INT8 "
    "weight-only), fp8 (128 x 128 blocks or per tensor), AWQ (4 bits), GPTQ (4 and 8 bits, without activation order), "
    "mxfp4 (the experts of gpt-oss)"
)
BLOCK = 128
ONLINE_GROUP = 32
"""Inputs that share a scale when a matrix is quantized to 4 bits at the start; few, as nothing is known of them."""

Layout = Literal["awq", "gptq", "gptq_v2", "compressed"]


@dataclass(frozen=True, slots=True)
class Fp8:
    """e4m3 weights with scales."""

    blocks: bool = False
    """A scale for each 128 x 128 block; else one for each output, or for the whole matrix."""
    scale_name: str = "weight_scale"


@dataclass(frozen=True, slots=True)
class Int:
    """Integer weights, computed with as they are stored, scaled by groups."""

    bits: int
    group: int
    """Inputs that share a scale; 0: all of a row."""
    symmetric: bool
    layout: Layout


@dataclass(frozen=True, slots=True)
class Gguf:
    """Tensors keep the type that the file has them in."""


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """e2m1 weights with a power of two for every 32 inputs; blocks and scales of all experts in one tensor each."""


Form = Fp8 | Int | Gguf | Mxfp4


@dataclass(frozen=True, slots=True)
class Group:
    """Some of a checkpoint's modules, and the form that they share."""

    targets: tuple[str, ...]
    form: Form

    def covers(self, module: str) -> bool:
        return any(target == "Linear" or matches(target, module) for target in self.targets)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is to be done with each matrix of the layers (embeddings, norms and routers are never quantized)."""

    groups: tuple[Group, ...] = ()
    ignored: tuple[str, ...] = ()
    """Modules that stay as they are: names, beginnings of names, or `re:` and a regular expression."""
    online: Literal["", "fp8", "int4"] = ""
    """Quantize what the checkpoint has not, when it is loaded. The head is left alone."""
    kv_scales: bool = False
    """The checkpoint has scales for a KV cache of FP8."""
    described: str = ""
    """For messages: the method, as the checkpoint or the flag calls it."""

    def form(self, module: str) -> Form | None:
        """How the checkpoint has this module (model.layers.0.mlp.down_proj); None: not quantized."""
        if any(matches(ignored, module) for ignored in self.ignored):
            return None
        return next((group.form for group in self.groups if group.covers(module)), None)

    def quantizes(self, module: str) -> bool:
        """Whether to quantize this module of a checkpoint that has it as it is."""
        return bool(self.online) and module != "lm_head"


NONE = Quantization()


def matches(pattern: str, module: str) -> bool:
    """As compressed-tensors and transformers read their lists: `re:` is matched from the start, a name is the module
    itself, one above it, or its last parts."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return f".{pattern}." in f".{module}."


def read_quantization(path: Path, asked: str) -> Quantization:
    """For the model at a path that read_architecture took; asked: --quantization.

    Raises UnsupportedModelError for a checkpoint in a form that this engine does not compute, and
    InvalidConfigurationError for a flag that does not go with the checkpoint.
    """
    config = _own(path)
    if asked == "gguf":
        if path.is_dir():
            raise InvalidConfigurationError(f"--quantization gguf is for .gguf files; {path} is a folder")
        return Quantization((Group(("Linear",), Gguf()),), described="gguf")
    if config is None:
        online = {"fp8": "fp8", "int4": "int4"}.get(asked, "")
        return Quantization(online=cast(Literal["", "fp8", "int4"], online), described=asked)
    found = from_quantization_config(config)
    if asked not in ("auto", "fp8") or (asked == "fp8" and not all(isinstance(g.form, Fp8) for g in found.groups)):
        raise InvalidConfigurationError(
            f"--quantization {asked}: {path} is quantized already ({found.described}); leave the flag out"
        )
    return found


def _own(path: Path) -> dict[str, Any] | None:
    if not path.is_dir():
        return None
    return json.loads((path / "config.json").read_text()).get("quantization_config")


def from_quantization_config(config: dict[str, Any]) -> Quantization:
    """What config.json says under quantization_config. Raises UnsupportedModelError."""
    method = str(config.get("quant_method", "?"))
    readers = {"compressed-tensors": _compressed, "fp8": _fp8, "awq": _awq, "gptq": _gptq, "mxfp4": _mxfp4}
    if method not in readers:
        raise refused(f"quantization method {method!r}")
    try:
        return readers[method](config)
    except KeyError as error:
        raise UnsupportedModelError(f"quantization_config ({method}) lacks the field {error}") from error


def refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} is not supported; {WORKS}")


def _names(config: dict[str, Any], *fields: str) -> tuple[str, ...]:
    found: list[str] = []
    for field in fields:
        found += cast("Sequence[str]", config.get(field) or ())
    return tuple(found)


def _fp8(config: dict[str, Any]) -> Quantization:
    block: Sequence[int] | None = config.get("weight_block_size")
    if block is not None and tuple(block) != (BLOCK, BLOCK):
        raise refused(f"fp8 with blocks of {list(block)}")
    form = Fp8(blocks=True, scale_name="weight_scale_inv") if block else Fp8()
    ignored = _names(config, "modules_to_not_convert", "ignored_layers") or ("lm_head",)
    return Quantization((Group(("Linear",), form),), ignored, described="fp8")


def _mxfp4(config: dict[str, Any]) -> Quantization:
    del config  # what it says is which modules are not: all but the experts
    return Quantization((Group((r"re:.*\.experts\.",), Mxfp4()),), described="mxfp4")


def _awq(config: dict[str, Any]) -> Quantization:
    if int(config["bits"]) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
        raise refused(f"AWQ with {config['bits']} bits, version {config.get('version')}")
    form = Int(4, max(int(config["group_size"]), 0), not config.get("zero_point", True), "awq")
    ignored = (*_names(config, "modules_to_not_convert"), "lm_head")
    return Quantization((Group(("Linear",), form),), ignored, described="awq")


def _gptq(config: dict[str, Any]) -> Quantization:
    bits = int(config["bits"])
    if bits not in (4, 8):
        raise refused(f"GPTQ with {bits} bits")
    if config.get("dynamic"):
        raise refused("GPTQ with other settings for some modules (dynamic)")
    layout: Layout = "gptq_v2" if config.get("checkpoint_format") == "gptq_v2" else "gptq"
    form = Int(bits, max(int(config["group_size"]), 0), bool(config.get("sym", True)), layout)
    head = () if config.get("lm_head") else ("lm_head",)
    return Quantization((Group(("Linear",), form),), (*_names(config, "modules_to_not_convert"), *head),
                        described="gptq")  # fmt: skip


def _compressed(config: dict[str, Any]) -> Quantization:
    sparse: dict[str, Any] = config.get("sparsity_config") or {}
    sparsity = sparse.get("format", "dense")
    if sparsity != "dense":
        raise refused(f"compressed-tensors sparsity {sparsity!r}")
    groups: list[Group] = []
    for given in config["config_groups"].values():
        form = _compressed_form(given, str(given.get("format") or config.get("format")))
        groups.append(Group(tuple(given["targets"]), form))
    cache: dict[str, Any] | None = config.get("kv_cache_scheme")
    if cache and (cache.get("num_bits") != 8 or cache.get("type") != "float" or cache.get("strategy") != "tensor"):
        raise refused(f"compressed-tensors kv_cache_scheme {cache}")
    return Quantization(
        tuple(groups), _names(config, "ignore"), kv_scales=bool(cache), described="compressed-tensors"
    )  # fmt: skip


def _compressed_form(given: dict[str, Any], written: str) -> Form:
    weights: dict[str, Any] = given["weights"]
    inputs: dict[str, Any] | None = given.get("input_activations")
    bits, kind = int(weights["num_bits"]), str(weights["type"])
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    if written == "float-quantized" and (bits, kind) == (8, "float"):
        if strategy == "block" and list(weights["block_structure"]) != [BLOCK, BLOCK]:
            raise refused(f"compressed-tensors blocks of {weights['block_structure']}")
        if strategy in ("tensor", "channel", "block"):
            return Fp8(blocks=strategy == "block")
    weight_only = written == "pack-quantized" and kind == "int" and inputs is None
    if weight_only and bits in (4, 8) and strategy in ("group", "channel"):
        group = int(weights["group_size"]) if strategy == "group" else 0
        return Int(bits, group, bool(weights.get("symmetric", True)), "compressed")
    how = f"{kind}{bits} weights per {strategy}{'' if inputs is None else ' with quantized activations'}"
    raise refused(f"compressed-tensors {written!r} ({how})")
