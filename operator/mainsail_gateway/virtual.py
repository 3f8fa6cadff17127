"""Virtual models: a name that stands for several services, as a ModelRoute says. Pure.

The first rule that fits a request decides. Of its targets one is chosen by weight (the same exact, sticky choice as
between revisions: split.py); then come the fallbacks in their order. Who is known to be unable now is asked last, not
never: what is known may be old, and the last one's answer is the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from mainsail_gateway.asgi import Headers
from mainsail_gateway.split import Split, Sticky
from mainsail_gateway.watch import Key, KubeObject

Event = Literal["Overloaded", "Down", "SchemaFailure"]
State = Literal["ready", "busy", "down"]


class SecretRef(msgspec.Struct, frozen=True):
    name: str
    key: str = "key"


class External(msgspec.Struct, frozen=True):
    url: str
    model: str
    secretRef: SecretRef | None = None


class Target(msgspec.Struct, frozen=True):
    service: str | None = None
    external: External | None = None
    weight: int = 1

    @property
    def name(self) -> str:
        """For metrics, headers and messages."""
        return self.service if self.external is None and self.service is not None else _host(self.external)


def _host(external: External | None) -> str:
    return "" if external is None else external.url.partition("://")[2].partition("/")[0].rpartition("@")[2]


class HeaderMatch(msgspec.Struct, frozen=True):
    name: str
    value: str


class Match(msgspec.Struct, frozen=True):
    minPromptTokens: int | None = None
    maxPromptTokens: int | None = None
    tools: bool | None = None
    structured: bool | None = None
    profile: Literal["Latency", "Bulk"] | None = None
    header: HeaderMatch | None = None


class Rule(msgspec.Struct, frozen=True):
    to: list[Target]
    when: Match = Match()
    fallback: list[Target] = []
    fallbackOn: list[Event] = msgspec.field(default_factory=lambda: ["Overloaded", "Down"])


class RouteSpec(msgspec.Struct, frozen=True):
    rules: list[Rule]
    names: list[str] = []


class ModelRoute(KubeObject, frozen=True, kw_only=True):
    spec: RouteSpec


@dataclass(frozen=True, slots=True)
class Virtual:
    """One ModelRoute, as requests meet it."""

    key: Key
    created: int
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules may ask about a request."""

    prompt_tokens: int
    tools: bool
    structured: bool
    bulk: bool
    headers: Headers


def fits(when: Match, facts: Facts) -> bool:
    """Whether all that is set holds."""
    least, most = when.minPromptTokens, when.maxPromptTokens
    return (
        (least is None or facts.prompt_tokens >= least)
        and (most is None or facts.prompt_tokens <= most)
        and (when.tools is None or facts.tools == when.tools)
        and (when.structured is None or facts.structured == when.structured)
        and (when.profile is None or facts.bulk == (when.profile == "Bulk"))
        and (when.header is None or _has(facts.headers, when.header))
    )


def _has(headers: Headers, wanted: HeaderMatch) -> bool:
    name, value = wanted.name.lower().encode("latin-1", "replace"), wanted.value.encode("latin-1", "replace")
    return any(known == name and said == value for known, said in headers)


def matching(rules: Sequence[Rule], facts: Facts) -> int | None:
    """The first rule that fits; None: none does."""
    return next((i for i, rule in enumerate(rules) if fits(rule.when, facts)), None)


def choose(rule: Rule, split: Split, sticky: Sticky | None) -> list[Target]:
    """Whom to ask, in order: one target by weight, then the fallbacks. Nobody twice."""
    weights = [(str(i), target.weight) for i, target in enumerate(rule.to) if target.weight > 0]
    first = rule.to[int(split.choose(weights, sticky))]
    found = [first]
    for target in rule.fallback:
        if all((t.service, t.external) != (target.service, target.external) for t in found):
            found.append(target)
    return found


def order(targets: Sequence[Target], states: Mapping[str, State], on: Sequence[Event]) -> list[Target]:
    """The same targets, those last that are known to be unable now: overloaded ones, then those that are down."""
    rank = {"ready": 0, "busy": int("Overloaded" in on), "down": 2 * ("Down" in on)}
    return sorted(targets, key=lambda target: rank[states.get(target.name, "ready")])


def event_of(status: int) -> Event | None:
    """What an answer's status means for the fallbacks; None: it is the answer."""
    if status == 429:
        return "Overloaded"
    return "Down" if status in (500, 502, 503, 504) else None


class Splits:
    """The credits of every rule of every route."""

    def __init__(self) -> None:
        self._splits: dict[tuple[Key, int], Split] = {}

    def of(self, key: Key, rule: int) -> Split:
        found = self._splits.get((key, rule))
        if found is None:
            found = self._splits[key, rule] = Split()
        return found

    def retain(self, keys: set[Key]) -> None:
        self._splits = {place: split for place, split in self._splits.items() if place[0] in keys}
