"""The draft model's own runner, beside the model's: weights, a small KV pool, CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from mainsail_engine.config import CacheConfig, EngineConfig, ModelConfig
from mainsail_engine.errors import InvalidConfigurationError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.checkpoint_config import read_architecture
from mainsail_engine.runner import memory
from mainsail_engine.runner.model_runner import ModelRunner, choose_device, choose_dtype
from mainsail_engine.speculative.draft_model import DRAFT_SHARE, DraftModel, draft_blocks


@dataclass(frozen=True, slots=True)
class Draft:
    config: EngineConfig
    """Of the draft, as if it was served itself."""
    runner: ModelRunner

    def source(self) -> DraftModel:
        """A new one, which has seen nothing."""
        return DraftModel(
            self.runner,
            num_slots=self.config.scheduler.max_num_seqs,
            budget=self.runner.budget,
        )


def load_draft(config: EngineConfig) -> Draft:
    """Load the draft model, before the model itself: the KV pool gets what is left. Raises StartupError's kinds."""
    speculative = config.speculative
    if speculative is None or speculative.model is None:
        raise InvalidConfigurationError("--speculative-config: a draft model is needed")
    path = Path(speculative.model)
    if not path.exists():
        raise InvalidConfigurationError(f"--speculative-config: the draft model {path} does not exist")
    architecture = read_architecture(path)
    longest = architecture.max_position_embeddings
    longest = min(longest, config.model.max_model_len or longest)
    device = choose_device(config.device)
    own = msgspec.structs.replace(
        config,
        model=ModelConfig(
            path=speculative.model, dtype=config.model.dtype, load_format=config.model.load_format,
            max_model_len=longest,
        ),
        cache=CacheConfig(num_blocks=_blocks(config, architecture, longest, device), enable_prefix_caching=False),
        kv_events=None,
        lora=None,
        speculative=None,
        tensor_parallel_size=1,
    )  # fmt: skip
    return Draft(own, ModelRunner(own))


def _blocks(config: EngineConfig, a: Architecture, longest: int, device: torch.device) -> int:
    dtype = choose_dtype(config.model.dtype, a, device)
    cuda = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[1] if cuda else memory.available_host_bytes()
    return draft_blocks(
        memory.block_bytes(a.num_layers, a.num_kv_heads, a.head_dim, dtype),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=longest,
        room_bytes=int(room * DRAFT_SHARE),
    )


def check_vocabularies(draft: int, model: int) -> None:
    """Raises InvalidConfigurationError: a draft's tokens must mean the same."""
    if draft != model:
        raise InvalidConfigurationError(
            f"--speculative-config: the draft model has a vocabulary of {draft} tokens, the model one of {model}: "
            "they must be the same"
        )
