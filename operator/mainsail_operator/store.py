"""What the watches have brought: small frozen values by InferenceService, kept true even when a watch loses an event.

kopf watches and hands over events one by one. After a 410, or a long disconnection, it lists again and hands over what
is there, but nobody tells it what has gone meanwhile. So this store can also be set right by a list (`reconcile`): what
the list does not hold, and was not seen after it, is gone. Resource versions decide what is newer, as the API allows
since 1.35 and every API server has done before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from mainsail_operator.types import JSON

Key = tuple[str, str]
"""Namespace and name."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Held(Generic[T]):
    value: T
    owner: Key
    version: int
    uid: str


class Collection(Generic[T]):
    """The objects of one kind, grouped by what they belong to.

    owner: the group of an object, None for one that is of no interest. read: JSON → what is kept of it.
    """

    def __init__(self, owner: Callable[[JSON], Key | None], read: Callable[[JSON], T]) -> None:
        self.owner_of = owner
        self._read = read
        self._held: dict[Key, _Held[T]] = {}
        self._groups: dict[Key, dict[Key, T]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        """Whether there is an object of that namespace and name."""
        return key in self._held

    def of(self, owner: Key) -> list[T]:
        return list(self._groups.get(owner, {}).values())

    def owners(self) -> list[Key]:
        return list(self._groups)

    def put(self, obj: JSON) -> Key | None:
        """Keep the object unless something newer is here. Its group when that changed anything."""
        metadata: JSON = obj["metadata"]
        owner, version, key = self.owner_of(obj), int(metadata.get("resourceVersion") or 0), key_of(metadata)
        held = self._held.get(key)
        if owner is None:
            return self._drop(key)
        if held is not None and held.version > version:
            return None
        changed = held is None or held.version != version or held.uid != metadata.get("uid")
        if held is not None and held.owner != owner:
            self._drop(key)
        value = self._read(obj)
        self._held[key] = _Held(value, owner, version, str(metadata.get("uid") or ""))
        self._groups.setdefault(owner, {})[key] = value
        return owner if changed else None

    def remove(self, metadata: JSON) -> Key | None:
        """The object is gone. A namesake that is here already stays."""
        held = self._held.get(key_of(metadata))
        if held is None or (held.uid and metadata.get("uid") and held.uid != metadata["uid"]):
            return None
        return self._drop(key_of(metadata))

    def reconcile(self, items: Iterable[JSON], version: int, within: Callable[[Key], bool]) -> set[Key]:
        """Set right by a complete list of a scope, taken at a resource version. The groups that this changed."""
        listed: dict[Key, str] = {}
        changed = self.take(items, listed)
        return changed | self.retain(listed, version, within)

    def take(self, items: Iterable[JSON], listed: dict[Key, str]) -> set[Key]:
        """A page of a list, noted in `listed`. The groups that this changed."""
        changed: set[Key | None] = set()
        for obj in items:
            listed[key_of(obj["metadata"])] = str(obj["metadata"].get("uid") or "")
            changed.add(self.put(obj))
        return {key for key in changed if key is not None}

    def retain(self, listed: Mapping[Key, str], version: int, within: Callable[[Key], bool]) -> set[Key]:
        """The end of a list: what is not among the UIDs listed, and was not seen after it, is gone."""
        gone = [
            key for key, held in self._held.items()
            if within(key) and held.version <= version and listed.get(key) != held.uid
        ]  # fmt: skip
        return {group for key in gone if (group := self._drop(key)) is not None}

    def _drop(self, key: Key) -> Key | None:
        held = self._held.pop(key, None)
        if held is None:
            return None
        group = self._groups[held.owner]
        group.pop(key, None)
        if not group:
            del self._groups[held.owner]
        return held.owner


def key_of(metadata: Mapping[str, object]) -> Key:
    return str(metadata.get("namespace") or ""), str(metadata.get("name"))
