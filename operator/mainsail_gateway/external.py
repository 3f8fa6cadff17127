"""An OpenAI-compatible endpoint outside of the cluster, as a ModelRoute's last resort.

Its API key is a Secret of the route's namespace with the label `mainsail.dev/upstream-key`, watched only in the
namespaces that `--external-namespace` names: whoever may write ModelRoutes there decides where requests may go. The
client's own credentials never go out, and of its headers only those that matter.
"""

import asyncio
import base64
import binascii
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import httpx2

from mainsail_gateway.asgi import Headers, Message, Receive
from mainsail_gateway.auth import Secret
from mainsail_gateway.errors import GatewayError
from mainsail_gateway.relay import BrokenOff, ClientGone
from mainsail_gateway.virtual import External
from mainsail_gateway.watch import Key, Reflector, Timing

log = logging.getLogger(__name__)

LABEL = "mainsail.dev/upstream-key"
_RETURNED = frozenset((b"content-type", b"retry-after", b"x-request-id"))
CONNECT_S = 5.0


class Outside:
    """The way out."""

    def __init__(self, *, response_timeout_s: float, namespaces: Sequence[str]) -> None:
        self._timeout = httpx2.Timeout(response_timeout_s, connect=CONNECT_S)
        self._client: httpx2.AsyncClient | None = None
        self._namespaces = frozenset(namespaces)
        self._secrets: Mapping[str, Mapping[Key, Secret]] = {}

    def may(self, namespace: str, target: External) -> bool:
        """Whether a route of that namespace may go there: its namespace may, and its key is there."""
        reference = target.secretRef
        if namespace not in self._namespaces:
            return False
        return reference is None or self._key(namespace, target) is not None

    def _key(self, namespace: str, target: External) -> str | None:
        if target.secretRef is None:
            return None
        secret = self._secrets.get(namespace, {}).get((namespace, target.secretRef.name))
        if secret is None or target.secretRef.key not in (secret.data or {}):
            return None
        try:
            return base64.b64decode((secret.data or {})[target.secretRef.key]).decode("ascii").strip()
        except (binascii.Error, UnicodeDecodeError):
            return None

    def watch(self, client: httpx2.AsyncClient, timing: Timing) -> "list[Reflector[Secret]]":
        """Mirrors of the Secrets, to be run."""
        mirrors = {
            namespace: Reflector(
                client,
                f"/api/v1/namespaces/{namespace}/secrets",
                Secret,
                self._changed,
                label_selector=LABEL,
                timing=timing,
            )
            for namespace in sorted(self._namespaces)
        }
        self._mirrors = mirrors
        return list(mirrors.values())

    def _changed(self) -> None:
        self._secrets = {namespace: mirror.store for namespace, mirror in self._mirrors.items()}

    async def answer(
        self, namespace: str, target: External, path: str, body: bytes, receive: Receive,
        send: Callable[[Message], Awaitable[None]],
    ) -> int:  # fmt: skip
        """Ask there, and pass the answer on; its status.

        Raises GatewayError (nothing was sent), BrokenOff, ClientGone."""
        work = asyncio.ensure_future(self._ask(namespace, target, path, body, send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            return work.result()
        finally:
            left.cancel()
            work.cancel()

    async def _ask(
        self, namespace: str, target: External, path: str, body: bytes, send: Callable[[Message], Awaitable[None]]
    ) -> int:
        if self._client is None:
            self._client = httpx2.AsyncClient(timeout=self._timeout, trust_env=False, follow_redirects=False)
        headers = {"content-type": "application/json"}
        if (key := self._key(namespace, target)) is not None:
            headers["authorization"] = f"Bearer {key}"
        begun = False
        try:
            async with self._client.stream(
                "POST", target.url.rstrip("/") + path.removeprefix("/v1"), content=body, headers=headers
            ) as response:
                begun = True
                kept: Headers = [(k.lower(), v) for k, v in response.headers.raw if k.lower() in _RETURNED]
                await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
                async for data in response.aiter_bytes():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return response.status_code
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
            log.warning("%s: %s", target.url, str(error) or type(error).__name__)
            if begun:
                raise BrokenOff("the endpoint outside broke its answer") from error
            message = f"The endpoint outside that stands in for `{target.model}` did not answer."
            raise GatewayError(502, message, code="upstream_failed", retry_after_s=5.0) from error

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
