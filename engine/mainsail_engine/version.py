"""The version of the installed distribution."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    try:
        return metadata.version("mainsail")
    except metadata.PackageNotFoundError:
        return "0+source"
