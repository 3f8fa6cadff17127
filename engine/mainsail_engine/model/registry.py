"""Architecture name → class. A new model: its fields in families.py and, if it computes something new, a file here."""

from __future__ import annotations

from mainsail_engine.model.families import FAMILIES
from mainsail_engine.model.gemma import Gemma2ForCausalLM, GemmaForCausalLM
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.olmo2 import Olmo2ForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = dict.fromkeys(FAMILIES, LlamaForCausalLM) | {
    "GemmaForCausalLM": GemmaForCausalLM,
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma2ForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
}
