"""Lists everything once more, now and then, and whenever a watch may have missed something.

kopf lists again by itself after a 410 and shows that by events of no type for objects that it has shown before; what
was deleted in between it never mentions. So such an event (`suspect`) makes this list within a second, and every
`RELIST_S` it happens anyway: a watch is never trusted alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from mainsail_operator.store import Collection, Key
from mainsail_operator.types import JSON

log = logging.getLogger(__name__)

RELIST_S = 300.0
_DEBOUNCE_S = 0.5
_PAGE = 500
_BACKOFF_S = (0.5, 15.0)


@dataclass(frozen=True, slots=True)
class Source:
    """A kind as the API server lists it."""

    base: str
    """The API group's path, as /api/v1 or /apis/apps/v1."""
    plural: str
    selector: str
    collections: Sequence[Collection[Any]]
    """All that keep objects of this kind."""
    namespaced: bool = True


class Relister:
    def __init__(
        self,
        client: httpx2.AsyncClient,
        namespaces: Sequence[str],
        sources: Sequence[Source],
        wake: Callable[[Key], None],
    ) -> None:
        self._client = client
        self._scopes = namespaces
        self._sources = sources
        self._wake = wake
        self._suspected = asyncio.Event()

    def suspect(self) -> None:
        """A watch may have missed something: list soon."""
        self._suspected.set()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            pause = RELIST_S * random.uniform(0.9, 1.1)
            if failures:
                pause = min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**failures)
            try:
                async with asyncio.timeout(pause):
                    await self._suspected.wait()
                await asyncio.sleep(_DEBOUNCE_S)
            except TimeoutError:
                pass
            self._suspected.clear()
            try:
                await self.sweep()
                failures = 0
            except (httpx2.HTTPError, OSError, ValueError) as error:
                failures += 1
                log.warning("relist: %s", error or type(error).__name__)

    async def sweep(self) -> None:
        """List every kind and set the store right. Raises httpx2.HTTPError."""
        for source in self._sources:
            for scope in (self._scopes if source.namespaced else ()) or ("",):
                items, version = await self._list(source, scope)
                for collection in source.collections:
                    for key in collection.reconcile(items, version, lambda k, s=scope: not s or k[0] == s):
                        self._wake(key)

    async def _list(self, source: Source, scope: str) -> tuple[list[JSON], int]:
        path = f"{source.base}/namespaces/{scope}/{source.plural}" if scope else f"{source.base}/{source.plural}"
        params = {"limit": str(_PAGE)} | ({"labelSelector": source.selector} if source.selector else {})
        items: list[JSON] = []
        while True:
            response = await self._client.get(path, params=params)
            response.raise_for_status()
            page: JSON = response.json()
            items += page.get("items") or []
            metadata: JSON = page["metadata"]
            if not metadata.get("continue"):
                return items, int(metadata["resourceVersion"])
            params["continue"] = metadata["continue"]
