"""Where Triton has no wheels the CPU path works all the same: kernels are defined, and none is launched."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, sys
sys.modules["triton"] = None
from pathlib import Path
import mainsail_kernels

for module in sorted(Path(mainsail_kernels.__file__).parent.glob("*.py")):
    importlib.import_module(f"mainsail_kernels.{module.stem}")

import torch
from mainsail_kernels import reference
from mainsail_kernels.experts import Mixture
from mainsail_kernels.moe import routed_mlp

torch.set_num_threads(1)
torch.manual_seed(0)
x, scores, up, down = torch.randn(5, 8), torch.randn(5, 3), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
found = routed_mlp(x, scores, Mixture(up, down, None, None, None, None, 2, True, None))
weights, chosen = reference.route(scores.double(), 2, normalized=True)
truth = reference.grouped_mlp(x.double(), weights, chosen, up.double(), down.double())
assert (found - truth).norm() < 1e-4 * truth.norm(), (found, truth)
"""


@pytest.mark.timeout(300)
def test_the_cpu_path_needs_no_triton():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
