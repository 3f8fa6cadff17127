"""Whether a child is still as it was applied, or somebody has changed by hand what is ours in it (pure).

What was applied must be there; what others add beside it (labels, a cloud's annotations, defaults, an image pull
Secret) is theirs. Two things may have nothing added, because an addition changes what is said: label selectors, and
lists whose items have no name, as the peers and ports of a NetworkPolicy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from mainsail_operator.types import JSON

_NOT_OURS = frozenset({"apiVersion", "kind", "metadata", "status"})
_WHOLE = frozenset({"selector", "podSelector", "namespaceSelector", "matchLabels"})


def content_of(obj: Mapping[str, Any]) -> bytes:
    """What counts of an object, as text: some hundred bytes that are kept for each child."""
    found = {key: value for key, value in obj.items() if key not in _NOT_OURS}
    return json.dumps(found | {"labels": obj["metadata"].get("labels") or {}}, separators=(",", ":")).encode()


def holds(content: bytes, manifest: JSON) -> bool:
    """Whether an object of that content has all that the manifest says."""
    wanted = {key: value for key, value in manifest.items() if key not in _NOT_OURS}
    return _holds(json.loads(content), wanted | {"labels": manifest["metadata"]["labels"]})


def _holds(there: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(there, dict):
        found = cast(JSON, there)
        return all(
            found.get(key) == value if key in _WHOLE else _holds(found.get(key), value)
            for key, value in cast(JSON, wanted).items()
        )
    if isinstance(wanted, list) and isinstance(there, list):
        return _holds_all(cast("list[Any]", there), cast("list[Any]", wanted))
    return there == wanted


def _holds_all(there: list[Any], wanted: list[Any]) -> bool:
    if wanted and all(_name(item) for item in wanted):
        by_name = {_name(item): item for item in there}
        return all(_holds(by_name.get(_name(item)), item) for item in wanted)
    return len(there) == len(wanted) and all(map(_holds, there, wanted))


def _name(item: Any) -> str:
    return str(cast(JSON, item).get("name") or "") if isinstance(item, dict) else ""
