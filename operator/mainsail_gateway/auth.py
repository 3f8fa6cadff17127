"""API keys: who may ask for which model, how often, and how much. Pure; the clock is an argument.

A key is a Secret with the label `mainsail.dev/api-key`; its name is the key's name in metrics and messages. Its fields:

====================  ==================================================================================================
``sha256``            the key's SHA-256 in hex, so that nobody who reads the Secret has the key; several, one a line,
                      are all accepted (rotation: add the new one, move the clients, remove the old one)
``key``               or the key itself, likewise
``models``            names that it may ask for, separated by commas or spaces; ``*`` in a name stands for anything.
                      Default: all
``requestsPerMinute`` ``tokensPerMinute`` ``maxConcurrency``
                      limits, in each gateway. Default: none
``priority``          a class of the services' ``spec.admission.priorities``: what its requests get, and the highest
                      that they may ask for
====================  ==================================================================================================

Keys are random and long, so a fast hash is right; what a client sends is hashed before it is looked up, and compared in
constant time. A Secret that cannot be read is refused as a whole, and said: no limit is dropped in silence.

Limits are sliding: never more than so much in any 60 seconds (in steps of one). Tokens are taken beforehand as they are
estimated, and corrected when the answer says what it used.
"""

import base64
import binascii
import hashlib
import hmac
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType

from mainsail_gateway.asgi import Headers
from mainsail_gateway.errors import GatewayError
from mainsail_gateway.watch import Key as ObjectKey
from mainsail_gateway.watch import KubeObject

LABEL = "mainsail.dev/api-key"
WINDOW_S = 60
SHORTEST_KEY = 16
_FIELDS = ("sha256", "key", "models", "requestsPerMinute", "tokensPerMinute", "maxConcurrency", "priority")


class Secret(KubeObject, frozen=True, kw_only=True):
    data: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What one key allows."""

    name: str
    hashes: tuple[bytes, ...] = ()
    models: tuple[str, ...] = ()
    """Patterns; empty: all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    priority: str | None = None

    def may_use(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


class BadSecret(ValueError):
    """A Secret that says something that cannot be a key. The message names the field, and never its content."""


def api_key(secret: Secret) -> ApiKey:
    """A Secret's key. Raises BadSecret."""
    fields = _decoded(secret.data or {})
    hashes = [_digest(line) for line in fields.get("sha256", "").split()]
    hashes += [_hashed(line) for line in fields.get("key", "").split()]
    if not hashes:
        raise BadSecret("neither `sha256` nor `key` has a key in it")
    return ApiKey(
        name=secret.metadata.name,
        hashes=tuple(hashes),
        models=tuple(re.split(r"[\s,]+", fields["models"].strip())) if fields.get("models", "").strip() else (),
        requests_per_minute=_number(fields, "requestsPerMinute"),
        tokens_per_minute=_number(fields, "tokensPerMinute"),
        max_concurrency=_number(fields, "maxConcurrency"),
        priority=fields.get("priority", "").strip() or None,
    )


def _decoded(data: Mapping[str, str]) -> dict[str, str]:
    if unknown := sorted(data.keys() - set(_FIELDS)):
        raise BadSecret(f"`{unknown[0]}` is no field of a key: use {', '.join(_FIELDS)}")
    found: dict[str, str] = {}
    for name, value in data.items():
        try:
            found[name] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise BadSecret(f"`{name}` is not text") from None
    return found


def _digest(line: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", line):
        raise BadSecret("`sha256` must be 64 hex digits: printf %s KEY | sha256sum")
    return bytes.fromhex(line)


def _hashed(line: str) -> bytes:
    if len(line) < SHORTEST_KEY:
        raise BadSecret(f"`key` is shorter than {SHORTEST_KEY} characters: make one with `openssl rand -hex 24`")
    return hashlib.sha256(line.encode()).digest()


def _number(fields: Mapping[str, str], name: str) -> int | None:
    text = fields.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise BadSecret(f"`{name}` must be a whole number")
    return int(text)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys, by the hash of what a client sends."""

    by_hash: Mapping[bytes, ApiKey] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, keys: Iterable[ApiKey]) -> "KeyRing":
        """A hash that two Secrets have goes to the first by name."""
        by_hash: dict[bytes, ApiKey] = {}
        for key in sorted(keys, key=lambda key: key.name):
            for digest in key.hashes:
                by_hash.setdefault(digest, key)
        return cls(MappingProxyType(by_hash))

    def find(self, token: bytes) -> ApiKey | None:
        """The key that a client has sent."""
        digest = hashlib.sha256(token).digest()
        found = self.by_hash.get(digest)
        if found is None:
            return None
        # The look-up leaks at most how a hash begins, of which a client knows nothing; the verdict is in constant time.
        return found if sum(hmac.compare_digest(digest, known) for known in found.hashes) else None


def token_of(headers: Headers) -> bytes | None:
    """What the client sent: `Authorization: Bearer …`, or `api-key` or `x-api-key` as some clients do."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name in (b"api-key", b"x-api-key"):
            return value.strip()
    return None


CREDENTIALS = frozenset((b"authorization", b"api-key", b"x-api-key"))
"""Headers that end here: an engine has no use for a key, nor should its log have it."""


class Minute:
    """A sum over the last 60 seconds."""

    __slots__ = ("_seconds", "_sum")

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque()
        self._sum = 0

    def add(self, amount: int, now: float) -> None:
        """An amount of now; a negative one gives back what was added before, and never more than that."""
        if amount < 0:
            self._give_back(-amount, now)
            return
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + amount)
        else:
            self._seconds.append((second, amount))
        self._sum += amount

    def _give_back(self, amount: int, now: float) -> None:
        """The oldest first. A debt would let more through than the limit once what it was of has left the window."""
        self.total(now)
        for place, (second, held) in enumerate(self._seconds):
            less = min(held, amount)
            self._seconds[place] = (second, held - less)
            self._sum -= less
            amount -= less

    def total(self, now: float) -> int:
        while self._seconds and self._seconds[0][0] <= now - WINDOW_S - 1:
            self._sum -= self._seconds.popleft()[1]
        return self._sum

    def wait_for(self, room: int, limit: int, now: float) -> float:
        """Seconds until so much more is within the limit; 0: it is."""
        excess = self.total(now) + room - limit
        if excess <= 0:
            return 0.0
        for second, amount in self._seconds:
            excess -= amount
            if excess <= 0:
                return max(0.1, second + WINDOW_S + 1 - now)
        return float(WINDOW_S)


class Account:
    """What one key has used lately, in this pod."""

    def __init__(self) -> None:
        self.running = 0
        """In this process."""
        self.elsewhere: dict[int, int] = {}
        """By worker: in the pod's others (sharing.py)."""
        self._requests = Minute()
        self._tokens = Minute()

    def take(self, key: ApiKey, tokens: int, now: float) -> None:
        """Charge a request before it runs; `settle` it afterwards. Raises a 429 that names the limit."""
        running = self.running + sum(self.elsewhere.values())
        if key.max_concurrency is not None and running >= key.max_concurrency:
            raise over_limit(key.name, f"{key.max_concurrency} requests at once", 1.0)
        for limit, meter, amount, unit in (
            (key.requests_per_minute, self._requests, 1, "requests"),
            (key.tokens_per_minute, self._tokens, tokens, "tokens"),
        ):
            if limit == 0:
                raise over_limit(key.name, f"0 {unit} per minute", float(WINDOW_S))
            # A request larger than a whole minute's worth waits for a minute in which nothing else was used.
            if limit is not None and (wait := meter.wait_for(min(amount, limit), limit, now)):
                raise over_limit(key.name, f"{limit} {unit} per minute", wait)
        self.running += 1
        self._requests.add(1, now)
        self._tokens.add(tokens, now)

    def settle(self, taken: int, used: int | None, now: float, *, since: float | None = None) -> int:
        """The request has ended; by how many tokens its charge is corrected. used: those that it really used; None:
        that is not known. since: when it was charged, of which nothing is left to give back after a minute."""
        self.running -= 1
        more = 0 if used is None else used - taken
        if more < 0 and since is not None and since <= now - WINDOW_S - 1:
            more = 0
        if more:
            self._tokens.add(more, now)
        return more

    def hear(self, worker: int, running: int, requests: int, tokens: int, now: float) -> None:
        """What another worker has begun and ended."""
        self.elsewhere[worker] = running
        if requests:
            self._requests.add(requests, now)
        if tokens:
            self._tokens.add(tokens, now)

    def standing(self, now: float) -> tuple[int, int, int]:
        """What runs in this process; requests and tokens of the last minute in the whole pod."""
        return self.running, self._requests.total(now), self._tokens.total(now)


def over_limit(name: str, limit: str, retry_after_s: float) -> GatewayError:
    message = f"The API key `{name}` is over its limit of {limit}."
    return GatewayError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)


def unauthorized() -> GatewayError:
    message = "A valid API key is needed: send it as `Authorization: Bearer KEY`."
    headers: Headers = [(b"www-authenticate", b"Bearer")]
    return GatewayError(401, message, code="invalid_api_key", headers=headers)


def forbidden(key: ApiKey, model: str) -> GatewayError:
    message = f"The API key `{key.name}` may not use the model `{model[:200]}`."
    return GatewayError(403, message, code="model_not_allowed", param="model")


def ring(secrets: Mapping[ObjectKey, Secret]) -> tuple[KeyRing, dict[str, str]]:
    """The keys of these Secrets, and what is wrong with the others by name."""
    keys: list[ApiKey] = []
    wrong: dict[str, str] = {}
    for secret in secrets.values():
        try:
            keys.append(api_key(secret))
        except BadSecret as error:
            wrong[secret.metadata.name] = str(error)
    return KeyRing.of(keys), wrong
