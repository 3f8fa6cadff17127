"""The map: docs/architecture.md. For use from Python: `from mainsail_engine import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mainsail_engine.llm import LLM, LoRARequest, SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "LoRARequest", "SamplingParams", "StructuredOutputsParams"]


def __getattr__(name: str) -> Any:
    """On demand: the core process imports this package too, and needs none of it."""
    if name in __all__:
        from mainsail_engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
