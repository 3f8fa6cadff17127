"""Any other causal model of `transformers`, with our paged attention in the place of its own.

The modules and the checkpoint's names are transformers'; what it calls for attention is `_attend` below, registered in
its attention interface: it writes a layer's keys and values into our blocks and lets the step's `Attention` read them.
Positions come from the step, masks are never made. So prefix sharing, chunks, preemption and batching work as for the
models of this package; the linears, norms and experts run at transformers' speed, without CUDA graphs, on one device.

How many heads attention sees, and how wide they are, is not always in config.json (latent attention has wider keys than
values): it is read from one token's pass over the model without weights, on torch's meta device.

What cannot be right here is refused by name: models that keep a state other than keys and values, or whose masks say
more than causal with a window. What slips through is caught by a comparison at the start: the decoder runs over a few
tokens with transformers' own attention and with ours, and must come to the same hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.errors import MissingTensorError, StartupError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.attention import Attention
from mainsail_engine.model.families import refuse
from mainsail_engine.model.parallel import SINGLE, Parallel
from mainsail_engine.model.rotary import no_rotation

log = logging.getLogger(__name__)
INTERFACE = "mainsail"
_PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_HARMLESS = {
    "dropout", "position_ids", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
_COMPARED_TOKENS, _COMPARED_WINDOW = 40, 12
"""Most rows of the comparison are past the window."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a layer hands to attention."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    tells_window: bool
    """Whether it says how many tokens are seen; else only the mask that transformers would make knows."""

    @property
    def head_dim(self) -> int:
        """Of our blocks: keys and values are padded to the wider of them."""
        return max(self.key_dim, self.value_dim)


@dataclass(slots=True)
class Step:
    """What `_attend` needs of the step that runs."""

    attention: Attention
    kv_cache: torch.Tensor
    unrotated: torch.Tensor
    architecture: Architecture
    done: set[int] = field(default_factory=set[int])
    """Layers that asked for attention."""


def architecture_of(config: dict[str, Any], eos_token_ids: frozenset[int]) -> Architecture:
    """Of a config.json whose architecture is not one of families.py. Raises UnsupportedModelError."""
    with _refusing(str(config["architectures"][0])):
        return _architecture_of(config, eos_token_ids)


def _architecture_of(config: dict[str, Any], eos_token_ids: frozenset[int]) -> Architecture:
    ours = _transformers_config(config)
    geometry = _geometry(ours)
    return Architecture(
        name=str(config["architectures"][0]),
        num_layers=int(ours.num_hidden_layers),
        hidden_size=int(ours.hidden_size),
        intermediate_size=int(getattr(ours, "intermediate_size", 0) or 4 * ours.hidden_size),
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=int(ours.vocab_size),
        max_position_embeddings=int(ours.max_position_embeddings),
        rms_norm_eps=0.0,
        windows=_windows(ours, geometry),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=eos_token_ids,
        generic=True,
    )


class TransformersForCausalLM:
    """A model of transformers as the runner sees one."""

    captures_graphs = False
    reads_transposed_values = True
    """Its modules may wait for the device (experts), and torch would then not capture them."""

    def __init__(
        self, architecture: Architecture, path: Path, *, dummy: bool, dtype: torch.dtype, max_positions: int,
        device: torch.device, parallel: Parallel = SINGLE,
    ) -> None:  # fmt: skip
        self.architecture, self.parallel = architecture, parallel
        self.num_heads, self.num_kv_heads = architecture.num_heads, architecture.num_kv_heads
        self._unrotated = no_rotation(max_positions, device)
        with _refusing(architecture.name):
            whole = _random(path, dtype, device) if dummy else _pretrained(path, dtype, device)
            self._decoder, self._head = _split(whole.eval())
            with self._narrow():
                self._compare(device, dtype)

    def forward(self, token_ids: torch.Tensor, attention: Attention, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, [num_wanted, hidden_size]; as LlamaForCausalLM's."""
        step = Step(attention, kv_cache, self._unrotated, self.architecture)
        positions = attention.positions.unsqueeze(0)
        out = self._decoder(input_ids=token_ids.unsqueeze(0), position_ids=positions, use_cache=False, paged=step)
        if len(step.done) != self.architecture.num_layers:
            raise refuse(f"architecture {self.architecture.name} (not every layer asks for attention)")
        return attention.only_wanted(out.last_hidden_state[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size]."""
        return self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]

    @contextmanager
    def _narrow(self) -> Generator[None]:
        """Windows are small, so that a short prompt shows whether masks of transformers have one and attention not."""
        architecture, held = self.architecture, list[tuple[Any, int]]()
        owners: dict[int, Any] = {
            id(owner): owner for m in self._decoder.modules() for owner in (m, getattr(m, "config", None))
        }
        for owner in owners.values():
            window = getattr(owner, "sliding_window", None)
            if isinstance(window, int) and window > _COMPARED_WINDOW:
                held.append((owner, window))
                owner.sliding_window = _COMPARED_WINDOW
        self.architecture = replace(
            architecture, windows=tuple(min(window, _COMPARED_WINDOW) for window in architecture.windows)
        )
        try:
            yield
        finally:
            self.architecture = architecture
            for owner, window in held:
                owner.sliding_window = window

    @torch.inference_mode()
    def _compare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises UnsupportedModelError when our attention leads elsewhere than transformers' own."""
        a, n = self.architecture, min(_COMPARED_TOKENS, self.architecture.max_position_embeddings)
        blocks = -(-n // BLOCK_SIZE)
        shape = (a.num_layers, blocks, 2, a.num_kv_heads, BLOCK_SIZE, a.head_dim)
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(0, a.vocab_size, (n,), generator=generator).to(device)
        ours = self.forward(token_ids, _one_chunk(n, device), torch.zeros(shape, dtype=dtype, device=device))
        self.logits(ours[-1:])
        self._decoder.set_attn_implementation("eager")
        positions = torch.arange(n, device=device).unsqueeze(0)
        theirs = self._decoder(input_ids=token_ids.unsqueeze(0), position_ids=positions, use_cache=False)
        self._decoder.set_attn_implementation(INTERFACE)
        apart = (ours - theirs.last_hidden_state[0]).float().norm(dim=1)
        relative = float((apart / theirs.last_hidden_state[0].float().norm(dim=1)).median())
        if not relative < _TOLERANCE[dtype] * (20 if device.type == "cuda" and dtype == torch.float32 else 1):
            raise refuse(f"architecture {a.name} (its attention is not plain: hidden states are {relative:.0%} apart)")


_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
"""Of the median token's hidden state; experts chosen otherwise by a rounding error move single tokens far. On a GPU
attention multiplies float32 with 11 of its 24 bits."""


def _one_chunk(n: int, device: torch.device) -> Attention:
    """A prompt of n tokens alone, in the first blocks of a cache."""
    places = torch.arange(n, device=device)
    blocks = torch.arange(-(-n // BLOCK_SIZE), dtype=torch.int32, device=device)
    return Attention(
        positions=places, slot_mapping=places, block_tables=blocks.unsqueeze(0),
        chunk_start=torch.tensor([0, n], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([n], dtype=torch.int32, device=device), num_decodes=0, max_query_len=n,
    )  # fmt: skip


@dataclass(slots=True)
class _Hidden:
    """A decoder's output, of which nothing but the hidden states is there."""

    last_hidden_state: torch.Tensor

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _Given(torch.nn.Module):
    """Stands where the decoder was and gives what it gets, so that the model's own forward makes the logits."""

    def forward(self, *unused: Any, inputs_embeds: torch.Tensor, **ignored: Any) -> _Hidden:
        del unused, ignored
        return _Hidden(inputs_embeds)


def _split(whole: Any) -> tuple[Any, Any]:
    """(the decoder, the model without it): scales and caps of logits stay where transformers has them."""
    decoder = whole.base_model
    setattr(whole, whole.base_model_prefix, _Given())
    return decoder, whole


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, paged: Step, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [1, num_heads, n, key_dim] to [1, n, num_heads, value_dim]."""
    a, layer, value_dim = paged.architecture, int(cast(Any, module).layer_idx), value.shape[-1]
    heads, kv_heads, key_dim = query.shape[1], key.shape[1], query.shape[3]
    kv = paged.kv_cache[layer]
    width = kv.shape[-1]
    if (heads, kv_heads) != (a.num_heads, a.num_kv_heads) or max(key_dim, value_dim) > width:
        raise refuse(f"architecture {a.name} (layer {layer} has other heads than the first)")
    if layer in paged.done:
        raise refuse(f"architecture {a.name} (layer {layer} asks for attention twice)")
    paged.done.add(layer)
    _check_plain(a.name, attention_mask, more)
    rows = torch.cat([F.pad(x[0].transpose(0, 1), (0, width - x.shape[-1])) for x in (query, key, value)], dim=1)
    queries = paged.attention.rotate_and_write(
        rows.flatten(1), kv, paged.unrotated,
        num_heads=heads, num_kv_heads=kv_heads, q_norm=None, k_norm=None, eps=0.0,
    )  # fmt: skip
    window = a.windows[layer] if a.windows else int(sliding_window or 0)
    scale = key_dim**-0.5 if scaling is None else float(scaling)
    seen = paged.attention.attend(queries, kv, scale, window=window, soft_cap=float(softcap or 0.0), sinks=s_aux)
    return seen[..., :value_dim].unsqueeze(0), None


def _check_plain(name: str, attention_mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    asked = sorted(key for key, value in more.items() if value is not None and key not in _HARMLESS)
    if more.get("is_causal"):
        asked.remove("is_causal")
    if asked or attention_mask is not None:
        raise refuse(f"architecture {name}, whose attention asks for {', '.join(asked) or 'a mask of its own'},")


def _registered(function: Callable[..., Any], name: str = INTERFACE) -> str:
    import transformers

    cast(Any, transformers).AttentionInterface.register(name, function)
    return name


# -- configuration ---------------------------------------------------------------------------------------------------


def _transformers_config(config: dict[str, Any]) -> Any:
    """The configuration as transformers has it, if its model can run here."""
    name = str(config["architectures"][0])
    try:
        import transformers
    except ImportError as error:
        raise refuse(
            f"architecture {name} (without the package transformers; install mainsail[transformers])"
        ) from error
    if "auto_map" in config or not hasattr(transformers, name) or not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise refuse(f"architecture {name}")
    kind = getattr(transformers, name)
    ours = kind.config_class.from_dict({k: v for k, v in config.items() if k != "quantization_config"})
    what = _why_not(kind, ours) or ("a quantized checkpoint" if config.get("quantization_config") else None)
    if what is not None:
        raise refuse(f"architecture {name} with {what}")
    return ours


def _why_not(kind: Any, config: Any) -> str | None:
    if not kind._supports_attention_backend or getattr(kind, "_is_stateful", False):
        return "attention that cannot be replaced"
    if getattr(config, "attention_chunk_size", None):
        return "attention_chunk_size"
    odd = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    return f"layers of the kind {', '.join(sorted(odd))}" if odd else None


def _windows(config: Any, geometry: Geometry) -> tuple[int, ...]:
    """Per layer where layer_types says it, or attention does not; else each layer's attention says it itself."""
    kinds, window = getattr(config, "layer_types", None), int(getattr(config, "sliding_window", None) or 0)
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return () if geometry.tells_window else (window,) * int(config.num_hidden_layers)


@contextmanager
def _refusing(name: str) -> Generator[None]:
    """What transformers' modules raise is a refusal that names the model."""
    try:
        yield
    except (StartupError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.info("transformers' modules failed", exc_info=True)
        told = str(error).strip().partition("\n")[0][:200]
        raise refuse(f"architecture {name} (transformers' modules failed: {type(error).__name__}: {told})") from error


class _Seen(Exception):
    """Ends the probe."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.geometry = geometry


def _geometry(config: Any) -> Geometry:
    """What the first layer hands to attention, from a pass that ends there."""
    import transformers

    def look(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **more: Any) -> None:
        del module
        if "paged" not in more:
            raise refuse(f"architecture {type(model).__name__} (its layers keep arguments from attention)")
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        raise _Seen(Geometry(*sizes, tells_window="sliding_window" in more))

    config._attn_implementation = _registered(look, f"{INTERFACE}_probe")
    config.pad_token_id = None  # else the model looks for padding among the tokens, and waits for the device
    with torch.device("meta"):
        model = cast(Any, transformers.AutoModelForCausalLM).from_config(config)
        one = torch.zeros((1, 1), dtype=torch.int64)
        try:
            model.base_model(input_ids=one, position_ids=one, use_cache=False, paged=True)
        except _Seen as seen:
            return seen.geometry
    raise refuse(f"architecture {type(model).__name__} (its layers never ask for attention)")


# -- weights ---------------------------------------------------------------------------------------------------------


def _pretrained(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Raises MissingTensorError when the checkpoint lacks tensors; transformers would make them up."""
    import transformers

    model, report = cast(Any, transformers.AutoModelForCausalLM).from_pretrained(
        path, dtype=dtype, device_map={"": device}, attn_implementation=_registered(_attend),
        local_files_only=True, output_loading_info=True,
    )  # fmt: skip
    model.config.pad_token_id = None
    missing = sorted(report["missing_keys"])
    if missing:
        raise MissingTensorError(f"{path} has no tensor {', '.join(missing[:3])}, which the architecture needs")
    return model


def _random(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    config = cast(Any, transformers.AutoConfig).from_pretrained(path, local_files_only=True)
    config._attn_implementation = _registered(_attend)
    config.pad_token_id = None
    with torch.device(device):
        return cast(Any, transformers.AutoModelForCausalLM).from_config(config, dtype=dtype)
