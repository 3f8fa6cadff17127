"""Compiles decoder.c, once for each content of it, and finds what was compiled.

    python -m mainsail_kernels.cpu.build        compiles ahead, beside the source: for images and read-only checkouts

A library is named by the hash of the source and the compiler's options, so a stale one is never loaded. It is looked
for beside the source, then under the user's cache, and compiled into the cache when it is in neither: two seconds,
once. It is for a kind of CPU, not for the machine that compiled it. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("decoder.c")
DTYPES = ("float32", "bfloat16")
_OPTIONS = (
    "-O3", "-Wall", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno",
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma",
)  # fmt: skip
_OF_DTYPE = {"float32": ("-DBF16=0",), "bfloat16": ("-DBF16=1", "-mavx512bf16")}
_COMPILERS = ("gcc", "cc", "clang")
_LONGEST_S = 60.0

logger = logging.getLogger(__name__)


def library(dtype: str) -> Path | None:
    """The compiled library of one of DTYPES. None, and a line in the log, when there is none and none can be made."""
    name = _name(dtype)
    cached = _cache() / name
    for path in (SOURCE.with_name(name), cached):
        if path.exists():
            return path
    try:
        return _compile(dtype, cached)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        logger.warning("no kernels for this CPU could be compiled, PyTorch's operations do: %s %s", error, said[-2000:])
        return None


def _name(dtype: str) -> str:
    content = hashlib.sha256(SOURCE.read_bytes())
    content.update(" ".join((*_OPTIONS, *_OF_DTYPE[dtype])).encode())
    return f"decoder-{dtype}-{content.hexdigest()[:16]}.so"


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path(os.path.expanduser("~"), ".cache")) / "mainsail/kernels"


def _compile(dtype: str, target: Path) -> Path:
    """Into target, whole or not at all, however many do so at once. Raises OSError, subprocess.SubprocessError."""
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"there is none of the compilers {', '.join(_COMPILERS)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = tempfile.mkdtemp(dir=target.parent)
    except OSError:  # a home that cannot be written: for this process alone
        target = Path(tempfile.mkdtemp(), target.name)
        draft = tempfile.mkdtemp(dir=target.parent)
    try:
        made = Path(draft, target.name)
        command = [compiler, *_OPTIONS, *_OF_DTYPE[dtype], "-o", str(made), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LONGEST_S)
        made.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def main() -> None:
    wanted = [SOURCE.with_name(_name(dtype)) for dtype in DTYPES]
    for stale in set(SOURCE.parent.glob("decoder-*.so")) - set(wanted):
        stale.unlink()
    for dtype, path in zip(DTYPES, wanted, strict=True):
        if not path.exists():
            _compile(dtype, path)
        print(path)


if __name__ == "__main__":
    main()
