"""What every test shares: hypothesis and HTTP clients judge results, not times; what needs a GPU is skipped without
one."""

from __future__ import annotations

import contextlib
import inspect
import os
import resource
from importlib import import_module

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

IN_CI = bool(os.environ.get("CI"))
"""There, examples are the same from one commit to the next, so that none fails for a change that it has nothing to do
with; who works on the code explores."""
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=IN_CI, print_blob=True
)
settings.load_profile("untimed")
if IN_CI:  # nor are they drawn from the constants of whatever code is imported by then
    providers._get_local_constants = lambda: providers._local_constants

# Clients that are not told how long to wait give up after five seconds, for which a busy machine may well stand still.
for library in ("httpx", "httpx2"):
    with contextlib.suppress(ImportError):  # kernels are tested without them, too
        patience = inspect.signature(import_module(library).AsyncClient).parameters["timeout"].default
        patience.connect = patience.read = patience.write = patience.pool = 120.0

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"
"""Tests speak to servers on this machine only, whatever leads elsewhere from here."""
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536), most))
"""Shells allow 1,024 files: hundreds of clients, and who serves them, in one process come close to that."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; torch is asked only if one was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
