"""Steps of a long command: what is shown while they run, and what is said when one fails.

A step prints its name when it starts and its time when it ends. Output of other programs goes to one log file per
step, never to the terminal. A failure is a `StepError`: what failed, where its log is, what to do about it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

TAIL_LINES = 15


class StepError(Exception):
    """A step failed: `what` went wrong, the `log` that tells more, and what to `do`."""

    def __init__(self, what: str, *, do: str, log: Path | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.do = do
        self.log = log

    def report(self) -> str:
        """The whole story for a terminal, with the log's last lines."""
        lines = [f"failed: {self.what}"]
        if self.log is not None and self.log.exists():
            lines += [f"its log: {self.log} (the last lines follow)"]
            lines += [f"  | {line}" for line in tail(self.log)]
        return "\n".join([*lines, f"what to do: {self.do}"])


def tail(log: Path, count: int = TAIL_LINES) -> list[str]:
    """The last lines of a text file."""
    return log.read_text(errors="replace").splitlines()[-count:]


class Progress:
    """Prints steps with their times; knows all of them for the summary at the end."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self.times: list[tuple[str, float]] = []

    def say(self, text: str) -> None:
        """One line with the time since the command began."""
        with self._lock:
            print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """Time a block of work and show it."""
        self.say(f"{name} …")
        began = time.monotonic()
        try:
            yield
        except BaseException:
            self.say(f"{name}: FAILED after {time.monotonic() - began:.1f} s")
            raise
        took = time.monotonic() - began
        self.times.append((name, took))
        self.say(f"{name}: done in {took:.1f} s")

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self._began


class Background:
    """A piece of work beside the others; `wait` raises what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until the work has ended; raises its error here."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def run(
    argv: Sequence[str | Path],
    *,
    log: Path,
    do: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> None:
    """Run a program with its output appended to `log`; a non-zero end is a `StepError`."""
    words = [str(word) for word in argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(f"$ {shlex.join(words)}\n".encode())
        out.flush()
        try:
            ended = subprocess.run(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(env),
                cwd=cwd,
                input=(stdin or "").encode(),
                check=False,
            )
        except FileNotFoundError as error:
            raise StepError(f"the program {words[0]} is not there", do=do, log=log) from error
    if ended.returncode:
        raise StepError(f"`{_short(words)}` ended with code {ended.returncode}", do=do, log=log)


def read(
    argv: Sequence[str | Path],
    *,
    do: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> str:
    """A program's standard output; a non-zero end is a `StepError` with what it wrote to standard error."""
    words = [str(word) for word in argv]
    try:
        ended = subprocess.run(
            words, capture_output=True, text=True, env=_environment(env), cwd=cwd, input=stdin or "", check=False
        )
    except FileNotFoundError as error:
        raise StepError(f"the program {words[0]} is not there", do=do) from error
    if ended.returncode:
        raise StepError(f"`{_short(words)}` ended with code {ended.returncode}: {ended.stderr.strip()[-2000:]}", do=do)
    return ended.stdout


def wait_until(
    what: str, ready: Callable[[], bool], *, seconds: float, do: str, log: Path | None = None, every: float = 0.1
) -> None:
    """Poll a condition until it holds; a `StepError` naming it when it does not in time."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise StepError(f"{what}: not so after {seconds:.0f} s", do=do, log=log)
        time.sleep(every)


def report_and_exit(work: Callable[[], int]) -> None:
    """A command's main: its exit code, with a `StepError` told in words instead of a traceback."""
    try:
        code = work()
    except StepError as error:
        print(error.report(), file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("interrupted; what was started is ended by `make down`", file=sys.stderr)
        code = 130
    raise SystemExit(code)


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(extra or {})}


def _short(words: Sequence[str]) -> str:
    text = shlex.join(words)
    return text if len(text) <= 120 else f"{text[:117]}…"
