"""Fixtures of the engine's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)
DEFAULT_MODEL = Path.home() / ".cache/mainsail/models/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers are the same whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The path of the SmolLM2 GGUF. Its absence is a failure, not a skip: `make model` fetches it."""
    path = Path(os.environ.get("MAINSAIL_MODEL", DEFAULT_MODEL))
    if not path.is_file():
        pytest.fail(f"{path} is not there: run `make model`")
    return path
