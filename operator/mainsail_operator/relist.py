"""Lists everything at the start, once more now and then, and whenever a watch may have missed something.

The first list fills the store before any watch begins, so a pass never sees half of a cluster.

kopf lists again by itself after a 410 and shows that by events of no type for objects that it has shown before; what
was deleted in between it never mentions. So such an event (`suspect`) makes this list within a second, and every
`RELIST_S` it happens anyway: a watch is never trusted alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from mainsail_operator import memory
from mainsail_operator.store import Collection, Key
from mainsail_operator.types import JSON

log = logging.getLogger(__name__)

RELIST_S = 300.0
_DEBOUNCE_S = 0.5
_PAGE = 250
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

    async def first(self) -> None:
        """The list that everything starts from: until it succeeds."""
        failures = 0
        while True:
            try:
                await self.sweep()
                return
            except (httpx2.HTTPError, OSError, ValueError) as error:
                failures += 1
                log.warning("first list: %s", error or type(error).__name__)
                await asyncio.sleep(min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**failures))

    async def sweep(self) -> None:
        """List every kind and set the store right; then wake whom that concerns. Raises httpx2.HTTPError."""
        try:
            await self._sweep()
        finally:
            memory.give_back()

    async def _sweep(self) -> None:
        changed: set[Key] = set()
        for source in self._sources:
            for scope in (self._scopes if source.namespaced else ()) or ("",):
                changed |= await self._set_right(source, scope)
        for key in changed:
            self._wake(key)

    async def _set_right(self, source: Source, scope: str) -> set[Key]:
        """One kind, page by page: a list of ten thousand pods is never in memory as a whole."""
        listed: dict[Key, str] = {}
        changed: set[Key] = set()
        version = 0
        async for items, at in self._pages(source, scope):
            version = at
            for collection in source.collections:
                changed |= collection.take(items, listed)
        for collection in source.collections:
            changed |= collection.retain(listed, version, lambda key: not scope or key[0] == scope)
        return changed

    async def _pages(self, source: Source, scope: str) -> AsyncIterator[tuple[list[JSON], int]]:
        """Pages of items, each with the list's resource version."""
        path = f"{source.base}/namespaces/{scope}/{source.plural}" if scope else f"{source.base}/{source.plural}"
        params = {"limit": str(_PAGE)} | ({"labelSelector": source.selector} if source.selector else {})
        while True:
            response = await self._client.get(path, params=params)
            response.raise_for_status()
            page: JSON = response.json()
            metadata: JSON = page["metadata"]
            yield page.get("items") or [], int(metadata["resourceVersion"])
            if not metadata.get("continue"):
                return
            params["continue"] = metadata["continue"]
