"""Reads Prometheus' text form: only the series that are asked for, because an engine has ten times as many.

The format is that of prometheus.io/docs/instrumenting/exposition_formats (version 0.0.4) and OpenMetrics, as far as
both agree on samples. A line that cannot be read raises ValueError: half of a page would look like a counter's reset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Labels = tuple[tuple[str, str], ...]
"""Label names and values, sorted by name."""
Series = tuple[str, Labels]
"""A sample's name, suffixes included (`…_total`, `…_bucket`), and its labels."""

_LABEL = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')
_ESCAPE = re.compile(r"\\(.)")


def parse(text: str, wanted: Callable[[str], bool]) -> Iterator[tuple[Series, float]]:
    """The samples whose name `wanted` accepts. Raises ValueError with the line that cannot be read."""
    for line in text.split("\n"):  # only these: a label may hold what Python calls a line's end
        if not line or line[0] == "#":
            continue
        brace = line.find("{")
        name = line[:brace] if brace > 0 else line.partition(" ")[0]
        if not wanted(name):
            continue
        end = line.rfind("}") + 1 if brace > 0 else len(name)
        value = line[end:].split()
        if not value or (brace > 0 and end <= brace):
            raise ValueError(f"not a sample: {line[:200]!r}")
        labels = _labels(line[brace + 1 : end - 1]) if brace > 0 else ()
        try:
            yield (name, labels), float(value[0])
        except ValueError:
            raise ValueError(f"not a sample: {line[:200]!r}") from None


def _labels(text: str) -> Labels:
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _LABEL.match(text, at)
        if match is None:
            raise ValueError(f"not a set of labels: {text[:200]!r}")
        value = match[2]
        found.append((match[1], _ESCAPE.sub(_unescaped, value) if "\\" in value else value))
        at = match.end()
    return tuple(sorted(found))


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]
