"""Kernels that start before the one before them has ended: what makes that safe, read from their sources."""

import ast
from pathlib import Path

import pytest
import torch

import mainsail_kernels
from mainsail_kernels._triton import Card, dependent_launch, pretending

HOPPER = Card("NVIDIA H200", 132, (9, 0))
WRITES = {"store", "atomic_add", "atomic_xchg"}


def kernels() -> list[ast.FunctionDef]:
    """Those that wait for their inputs."""
    sources = sorted(Path(mainsail_kernels.__file__).parent.glob("*.py"))
    functions = [node for file in sources for node in ast.walk(ast.parse(file.read_text()))]
    return [f for f in functions if isinstance(f, ast.FunctionDef) and _lines(f, {"wait_for_inputs"})]


def _lines(function: ast.FunctionDef, names: set[str]) -> list[int]:
    """Where these are called."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _name(call.func) in names]


def _name(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_no_program_writes_or_ends_before_it_has_waited(kernel):
    waits = min(_lines(kernel, {"wait_for_inputs"}))
    ends = [node.lineno for node in ast.walk(kernel) if isinstance(node, ast.Return)]
    assert min([*_lines(kernel, WRITES), *ends], default=waits + 1) > waits


def test_kernels_between_products_of_one_row_or_many_start_the_next_one_first():
    device = torch.device("meta")
    with pretending(HOPPER):
        starts = {rows: dependent_launch(device, rows=rows)["DEPENDENT"] for rows in (0, 1, 2, 63, 64, 8192)}
        assert starts == {0: 1, 1: 2, 2: 1, 63: 1, 64: 2, 8192: 2}
        assert dependent_launch(device) == {"DEPENDENT": 1, "launch_pdl": True}
    with pretending(Card("NVIDIA A100", 108, (8, 0))):
        assert dependent_launch(device, rows=1) == {"DEPENDENT": False}
