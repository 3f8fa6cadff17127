"""A collection of Kubernetes objects, kept up to date: list, watch, and never trust a watch alone.

`Reflector` owns a store that mirrors one collection. It lists, watches from the list's resource version on, and
lists again when the API server says that the version is gone (410), and every `relist_s` in any case: watches have
been seen to lose a DELETED event over a reconnect, and to freeze. A broken watch goes on from the last version that
it saw (events or bookmarks). A watch that is silent for longer than bookmarks allow is taken for half-open and made
anew. While the API server is away the store stays as it is, and the loop tries again with growing, jittered pauses.

Modelled on client-go's reflector. lightkube gives the configuration and the authenticated HTTP client; the loop is our
own because it needs bookmarks, a timeout for silence, and bytes split at newlines only (httpx splits a line of JSON at
U+0085, which Go does not escape).
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import httpx2
import msgspec

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name."""


class Metadata(msgspec.Struct, frozen=True):
    name: str
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""
    creationTimestamp: str = ""
    labels: dict[str, str] = {}


class KubeObject(msgspec.Struct, frozen=True, kw_only=True):
    """What every watched type has; subclasses add the fields that they need, the rest of an object is skipped."""

    metadata: Metadata


class _ListMeta(msgspec.Struct):
    resourceVersion: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Bookmark(msgspec.Struct):
    metadata: _ListMeta


class Expired(Exception):
    """The API server no longer has the resource version: list again."""


class WatchFailed(Exception):
    """The API server ended a watch or refused a list in a way that calls for a pause and another try."""


@dataclass(frozen=True, slots=True)
class Timing:
    relist_s: float = 300.0
    silence_s: float = 90.0
    """Bookmarks come about every 60 s."""
    backoff_s: tuple[float, float] = (0.2, 15.0)
    """First and longest pause after a failure."""


T = TypeVar("T", bound=KubeObject)

_list_decoder = msgspec.json.Decoder(_List)
_event_decoder = msgspec.json.Decoder(_Event)


class Reflector(Generic[T]):
    """Mirrors one collection into `store`; `on_change` is called after each change, with nothing."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        path: str,
        kind: type[T],
        on_change: Callable[[], None],
        *,
        label_selector: str | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.path = path
        self.store: dict[Key, T] = {}
        self.synced = False
        self.lists = 0
        self.failures = 0
        """Failures in a row; 0 while all is well."""
        self._client = client
        self._decoder = msgspec.json.Decoder(kind)
        self._on_change = on_change
        self._timing = timing or Timing()
        self._selector = {} if label_selector is None else {"labelSelector": label_selector}
        self._version = ""
        self._relist_at = 0.0

    async def run(self) -> None:
        """Mirror until cancelled."""
        while True:
            try:
                if not self._version or time.monotonic() >= self._relist_at:
                    await self._list()
                await self._watch()
            except Expired as error:
                log.info("watch of %s: %s; listing again", self.path, error)
                self._version = ""
            except (httpx2.HTTPError, httpx2.StreamError, OSError, WatchFailed, msgspec.DecodeError) as error:
                await self._pause(error)

    async def _pause(self, error: Exception) -> None:
        self.failures += 1
        first, longest = self._timing.backoff_s
        pause = min(longest, first * 2 ** min(self.failures - 1, 30)) * random.uniform(0.5, 1.0)
        level = logging.INFO if self.failures == 1 else logging.WARNING
        log.log(level, "%s: %s; trying again in %.1f s", self.path, str(error) or type(error).__name__, pause)
        await asyncio.sleep(pause)

    async def _list(self) -> None:
        store: dict[Key, T] = {}
        params = {**self._selector, "limit": "500"}
        while True:
            response = await self._client.get(self.path, params=params)
            _check(response.status_code, response.content)
            page = _list_decoder.decode(response.content)
            for item in page.items or []:
                self._put(store, item)
            if not page.metadata.continue_:
                break
            params["continue"] = page.metadata.continue_
        changed = store != self.store or not self.synced
        self.store = store
        self.synced = True
        self.lists += 1
        self.failures = 0
        self._version = page.metadata.resourceVersion
        self._relist_at = time.monotonic() + self._timing.relist_s * random.uniform(0.9, 1.1)
        if changed:
            self._on_change()

    def _put(self, store: dict[Key, T], raw: msgspec.Raw) -> None:
        """One odd object must not take the others with it: it is left out, and said."""
        try:
            item = self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            log.warning("%s: an object is left out: %s", self.path, error)
            return
        store[item.metadata.namespace, item.metadata.name] = item

    async def _watch(self) -> None:
        seconds = max(1, round(self._relist_at - time.monotonic()))
        params = {
            **self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(seconds),
        }
        timeout = httpx2.Timeout(10.0, read=self._timing.silence_s)
        events = 0
        try:
            async with (
                asyncio.timeout_at(asyncio.get_running_loop().time() + seconds + 5.0),
                self._client.stream("GET", self.path, params=params, timeout=timeout) as response,
            ):
                if response.status_code != 200:
                    _check(response.status_code, await response.aread())
                async for line in _lines(response):
                    self._apply(_event_decoder.decode(line))
                    self.failures = 0
                    events += 1
        except TimeoutError:
            return
        if not events and time.monotonic() < self._relist_at:
            raise WatchFailed("the watch ended without an event")

    def _apply(self, event: _Event) -> None:
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            if status.code == 410:
                raise Expired(status.message)
            raise WatchFailed(f"{status.code} {status.message}")
        if event.type == "BOOKMARK":
            self._version = msgspec.json.decode(event.object, type=_Bookmark).metadata.resourceVersion
            return
        meta = msgspec.json.decode(event.object, type=_Bare).metadata
        key = (meta.namespace, meta.name)
        if event.type == "DELETED":
            self.store.pop(key, None)
        else:
            self._put(self.store, event.object)
        self._version = meta.resourceVersion
        self._on_change()


class _Bare(msgspec.Struct):
    metadata: Metadata


def _check(status: int, body: bytes) -> None:
    if status == 410:
        raise Expired("the resource version is gone")
    if status != 200:
        raise WatchFailed(f"HTTP {status}: {body[:300].decode(errors='replace')}")


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line:
                yield line
