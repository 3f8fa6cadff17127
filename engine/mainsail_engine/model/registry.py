"""Architecture name → class. A new model: its fields in families.py and, if it computes something new, a file here."""

from __future__ import annotations

from pathlib import Path

import torch

from mainsail_engine.errors import UnsupportedModelError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.bert import BertModel
from mainsail_engine.model.families import ENCODERS, FAMILIES
from mainsail_engine.model.gemma import Gemma2ForCausalLM, GemmaForCausalLM
from mainsail_engine.model.generic import TransformersForCausalLM
from mainsail_engine.model.gpt_oss import GptOssForCausalLM
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.loader import open_weights
from mainsail_engine.model.olmo2 import Olmo2ForCausalLM
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.quantization import NONE, Quantization

Model = LlamaForCausalLM | BertModel | TransformersForCausalLM

DECODERS: dict[str, type[LlamaForCausalLM]] = dict.fromkeys(FAMILIES, LlamaForCausalLM) | {
    "GemmaForCausalLM": GemmaForCausalLM,
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma2ForCausalLM,
    "GptOssForCausalLM": GptOssForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
}
MODELS: dict[str, type[LlamaForCausalLM] | type[BertModel]] = DECODERS | dict.fromkeys(ENCODERS, BertModel)


def load_model(
    architecture: Architecture, path: Path, *, dummy: bool, dtype: torch.dtype, max_positions: int,
    device: torch.device, parallel: Parallel, quantization: Quantization = NONE,
) -> Model:  # fmt: skip
    """The model at a path that read_architecture took. Raises StartupError's kinds."""
    if architecture.generic:
        if quantization.groups or quantization.online:
            raise UnsupportedModelError(
                f"{path}: quantized weights ({quantization.described}) are not supported for {architecture.name}, "
                "which runs through transformers' modules"
            )
        return TransformersForCausalLM(
            architecture, path, dummy=dummy, dtype=dtype, max_positions=max_positions, device=device, parallel=parallel
        )
    weights = open_weights(
        path, architecture, dummy=dummy, device=device, dtype=dtype, quantization=quantization
    )  # fmt: skip
    kind = MODELS[architecture.name]
    return kind(architecture, weights, max_positions=max_positions, device=device, parallel=parallel)
