"""Builders that the operator's tests share."""

from __future__ import annotations

from typing import Any

import pytest

from mainsail_operator.objects import Owner
from mainsail_operator.settings import Settings
from mainsail_operator.types import InferenceServiceSpec


@pytest.fixture
def owner() -> Owner:
    return Owner("demo", "default", "uid-1")


@pytest.fixture
def settings() -> Settings:
    return Settings(engine_image="engine:1")


@pytest.fixture
def make_spec():
    """A spec from keyword arguments in wire form."""

    def make(**fields: Any) -> InferenceServiceSpec:
        return InferenceServiceSpec.model_validate({"model": {"uri": "pvc://models/m.gguf"}} | fields)

    return make
