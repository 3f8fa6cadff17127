"""The tests of this folder once more, with the kernels themselves run by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.timeout(1000)
@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="the tests beside this one run the kernels already, compiled or interpreted",
)
def test_kernels_through_the_interpreter():
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    files = sorted(str(path) for path in FOLDER.glob("test_*.py") if path != Path(__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
