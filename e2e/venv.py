"""The checkout's virtual environment: every extra, at the pinned versions, compiled ahead.

Made by uv: the one on PATH, or one in a small environment of its own under the cache. A stamp with the hash of all
that decides the content makes it a no-op when nothing changed. What the containers import is compiled to bytecode here,
because they see it read-only and would compile torch anew at every start.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

from e2e.cluster import cache
from e2e.cluster.place import Place, this_place
from e2e.steps import Progress, StepError, report_and_exit, run

UV = "0.13.9"
EXTRAS = "operator,gateway,tracing,epp,fetch,engine,dev"
OLDEST_PYTHON = (3, 11)
NETWORK = "see the log; a failed download is tried again by running it again"


def ensure(place: Place) -> bool:
    """Make or update the environment; False when there was nothing to do."""
    if sys.version_info < OLDEST_PYTHON:
        raise StepError(f"this is Python {sys.version.split()[0]}", do="use 3.11 or later: `make PYTHON=python3.11 …`")
    stamp, wanted = place.venv / "mainsail-stamp", _content(place)
    changed = not (stamp.exists() and stamp.read_text() == wanted and (place.venv / "bin/python").exists())
    if changed:
        _install(place)
    _prepare_sources(place)
    if changed:
        _compile_imports(place)
        stamp.write_text(wanted)
    return changed


def uv(place: Place) -> Path:
    """The uv to use; installs one under the cache when PATH has none."""
    if (found := shutil.which("uv")) is not None:
        return Path(found)
    key = cache.key_of(UV, sys.version)
    return cache.entry(place.cache, f"uv-{key}", lambda draft: _bootstrap(draft, place.logs / "uv.log")) / "bin/uv"


def _bootstrap(folder: Path, log: Path) -> None:
    # Debian keeps what venv needs in a package of its own, which a fresh machine does not have.
    make = [sys.executable, "-m", "venv", "--clear", folder]
    try:
        run(make, log=log, do="see the log")
    except StepError:
        install = ["apt-get", "install", "--yes", "--no-install-recommends", "python3-venv"]
        for command in (["apt-get", "update"], install):
            run(command, log=log, do="install Debian's python3-venv by hand, or put uv on PATH")
        run(make, log=log, do="see the log, or put uv on PATH")
    run([folder / "bin/python", "-m", "pip", "install", f"uv=={UV}"], log=log, do=NETWORK)


def _content(place: Place) -> str:
    files = (place.checkout / "pyproject.toml", place.checkout / ".ci/constraints.txt")
    return cache.key_of(EXTRAS, sys.version, *(file.read_bytes() for file in files))


def _install(place: Place) -> None:
    log = place.logs / "venv.log"
    program, python = uv(place), place.venv / "bin/python"
    if not python.exists():
        base = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
        run([program, "venv", "--no-python-downloads", "--python", base, place.venv], log=log, do="see the log")
    run([program, "pip", "install", "--python", python, "--constraint", ".ci/constraints.txt",
         "--editable", f".[{EXTRAS}]"], log=log, cwd=place.checkout, do=NETWORK)  # fmt: skip


# Importing every module compiles just what is imported, a twentieth of the environment.
IMPORT_ALL = """
import importlib, pkgutil
for package in ("mainsail_operator", "mainsail_gateway", "mainsail_fetch", "mainsail_engine"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except Exception as error:  # what is broken is for the tests to say; here it is only not compiled
                print(module.name, repr(error))
"""


def _compile_imports(place: Place) -> None:
    run([place.venv / "bin/python", "-c", IMPORT_ALL], log=place.logs / "compile.log", do="see the log",
        env={"PYTHONDONTWRITEBYTECODE": ""})  # fmt: skip


def _prepare_sources(place: Place) -> None:
    """Compile the packages, and let a container's user read them even if the checkout was made for its owner only.

    The CPU's kernels too, which containers would compile at every start. Without a compiler there are none.
    """
    if shutil.which("gcc") is not None:
        run(
            [place.venv / "bin/python", "-m", "mainsail_kernels.cpu.build"],
            log=place.logs / "compile.log",
            do="see the log",
        )
    run([place.venv / "bin/python", "-m", "compileall", "-q", *place.sources], log=place.logs / "compile.log",
        do="correct the file that is named")  # fmt: skip
    for source in place.sources:
        for folder, _, names in os.walk(source):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                _let_read(path)


def _let_read(path: Path) -> None:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return
    wanted = status.st_mode | (0o055 if stat.S_ISDIR(status.st_mode) else 0o044)
    if wanted != status.st_mode:
        path.chmod(stat.S_IMODE(wanted))


def main() -> int:
    """`make venv`"""
    os.umask(0o022)
    progress = Progress()
    with progress.step("virtual environment"):
        ensure(this_place())
    return 0


if __name__ == "__main__":
    report_and_exit(main)
