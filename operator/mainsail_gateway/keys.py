"""The keys in use: watched Secrets, what each key has used, and what the metrics say of it.

`Keys` is asked once for each request (`enter`) and told when it has ended. Rotation needs no restart: a changed
Secret is in force as soon as the watch brings it, and with the API server away, what was known last stays in force.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import httpx2
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mainsail_gateway import auth
from mainsail_gateway.asgi import Headers, Send
from mainsail_gateway.auth import LABEL, Account, ApiKey, KeyRing, Secret
from mainsail_gateway.errors import GatewayError
from mainsail_gateway.usage import Usage
from mainsail_gateway.watch import Reflector, Timing

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Charge:
    """One request of a key, while it runs."""

    usage: Usage | None
    """None: nobody counts."""
    code: int = 499
    """What came of it; 499: the client left."""
    since: float = field(default_factory=time.monotonic)

    def meter(self, send: Send) -> Send:
        """`send`, with what passes counted."""
        return send if self.usage is None else self.usage.meter(send)


OnUse = Callable[[str, int, int, int], None]
"""The key's name, how many of its requests run here, and how many requests and tokens more it has used."""


class Keys(Collector):
    def __init__(self) -> None:
        self.synced = False
        self._ring = KeyRing()
        self._accounts: dict[str, Account] = {}
        self._codes: dict[tuple[str, str], int] = {}
        self._tokens: dict[tuple[str, str], int] = {}
        self._wrong: Mapping[str, str] = {}
        self.on_use: OnUse | None = None
        """Told of each request that begins or ends here (sharing.py)."""

    def use(self, ring: KeyRing, wrong: Mapping[str, str]) -> None:
        """These keys from now on; what a key has used stays charged while it exists."""
        names = {key.name for key in ring.by_hash.values()}
        for name in wrong.keys() - self._wrong.keys():
            log.warning("Secret %s is no key: %s", name, wrong[name])
        self._ring, self._wrong = ring, wrong
        self._accounts = {name: self._accounts.get(name) or Account() for name in names}
        for counts in (self._codes, self._tokens):
            for label in [label for label in counts if label[0] not in names]:
                del counts[label]
        self.synced = True

    def check(self, headers: Headers) -> ApiKey:
        """Whose request this is. Raises a 401, and a 503 before the keys are known."""
        if not self.synced:
            raise GatewayError(503, "The API keys are not known yet.", code="not_ready", retry_after_s=1.0)
        token = auth.token_of(headers)
        key = self._ring.find(token) if token else None
        if key is None:
            raise auth.unauthorized()
        return key

    def take(self, key: ApiKey, tokens: int) -> Account:
        """Charge a request. Raises a 429 with a Retry-After. The caller owes a `settle`."""
        account = self._accounts.get(key.name)
        if account is None:  # the key went while the request's body came
            raise auth.unauthorized()
        account.take(key, tokens, asyncio.get_running_loop().time())
        if self.on_use is not None:
            self.on_use(key.name, account.running, 1, tokens)
        return account

    def settle(self, key: ApiKey, account: Account, taken: int, charge: Charge) -> None:
        """A charged request has ended."""
        usage, code = charge.usage or Usage(0), charge.code
        # A stream is charged for what its client has of it, also if that left before the end.
        answered = code == 200 or usage.streamed
        used = usage.total if answered else 0
        more = account.settle(taken, used, asyncio.get_running_loop().time(), since=charge.since)
        if self.on_use is not None:
            self.on_use(key.name, account.running, 0, more)
        self.count(key, code)
        if answered:
            for kind, count in (("prompt", usage.prompt), ("completion", usage.completion)):
                label = (key.name, kind)
                self._tokens[label] = self._tokens.get(label, 0) + count

    def hear(self, worker: int, name: str, running: int, requests: int, tokens: int) -> None:
        """What a key has used at another worker of this pod."""
        account = self._accounts.get(name)
        if account is not None:
            account.hear(worker, running, requests, tokens, asyncio.get_running_loop().time())

    def forget(self, worker: int) -> None:
        """Another worker has begun anew: nothing runs there."""
        for account in self._accounts.values():
            account.elsewhere.pop(worker, None)

    def standing(self) -> dict[str, tuple[int, int, int]]:
        """By name: what runs here, and requests and tokens of the last minute at all workers."""
        now = asyncio.get_running_loop().time()
        found = {name: account.standing(now) for name, account in self._accounts.items()}
        return {name: numbers for name, numbers in found.items() if any(numbers)}

    def count(self, key: ApiKey, code: int) -> None:
        label = (key.name, str(code))
        self._codes[label] = self._codes.get(label, 0) + 1

    def describe(self) -> Iterator[Metric]:
        return iter(self._families())

    def collect(self) -> Iterator[Metric]:
        requests, tokens, running, wrong = families = self._families()
        for label, count in list(self._codes.items()):
            requests.add_metric(label, count)
        for label, count in list(self._tokens.items()):
            tokens.add_metric(label, count)
        for name, account in list(self._accounts.items()):
            running.add_metric((name,), account.running)
        wrong.add_metric((), len(self._wrong))
        yield from families

    def _families(self) -> tuple[CounterMetricFamily, CounterMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        of = "mainsail:gateway_"
        return (
            CounterMetricFamily(of + "key_requests", "Requests by API key and HTTP status.", labels=("key", "code")),
            CounterMetricFamily(
                of + "key_tokens", "Tokens by API key, of prompts and of answers.", labels=("key", "kind")
            ),
            GaugeMetricFamily(of + "key_requests_in_flight", "Requests running, by API key.", labels=("key",)),
            GaugeMetricFamily(of + "invalid_keys", "Secrets with the label of a key that are none.", labels=()),
        )


class KeyWatch:
    """Keeps `keys` as the Secrets of a namespace say."""

    def __init__(self, client: httpx2.AsyncClient, namespace: str, keys: Keys, *, timing: Timing | None = None) -> None:
        self._keys = keys
        path = f"/api/v1/namespaces/{namespace}/secrets"
        self._secrets = Reflector(client, path, Secret, self._changed, label_selector=LABEL, timing=timing)

    def _changed(self) -> None:
        if self._secrets.synced:
            self._keys.use(*auth.ring(self._secrets.store))

    async def run(self) -> None:
        await self._secrets.run()
