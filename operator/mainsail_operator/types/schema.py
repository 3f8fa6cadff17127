"""What all of the resource's models share: the group, the base model, CEL rules, durations, quantities."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "mainsail.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"

JSON = dict[str, Any]

_DURATION = re.compile(r"(?=.)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds(duration: str) -> int:
    """`2m30s` → 150. Raises ValueError for anything but hours, minutes and whole seconds in that order."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a duration: write it as 90s, 2m30s or 1h")
    hours, minutes, secs = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + secs


def check_duration(value: str) -> str:
    seconds(value)
    return value


def rule(expression: str, message: str, *, computed: bool = False, path: str | None = None) -> JSON:
    """One CEL rule of the CRD. `computed` messages are CEL expressions themselves."""
    found: JSON = {"rule": expression, "messageExpression" if computed else "message": message}
    return found | ({"fieldPath": path} if path else {})


def rules(*rules: JSON, **more: Any) -> JSON:
    return {"x-kubernetes-validations": list(rules), **more}


class Model(BaseModel):
    """Frozen, camelCase on the wire, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


_DURATION_RULE = rule(
    "self.matches('^([0-9]+h)?([0-9]+m)?([0-9]+s)?$') && self != ''", "write a duration as 90s, 2m30s or 1h"
)
_DURATION_CEL = "!self.matches('^([0-9]+h)?([0-9]+m)?([0-9]+s)?$') || self == '' || "


def duration_field(most: str, *, above_zero: bool = False) -> Any:
    bounds = [rule(f"{_DURATION_CEL}duration(self) <= duration('{most}')", f"at most {most}")]
    if above_zero:
        bounds.append(rule(f"{_DURATION_CEL}duration(self) > duration('0s')", "more than 0s"))
    return Field(max_length=16, json_schema_extra=rules(_DURATION_RULE, *bounds))


DrainTimeout = Annotated[str, AfterValidator(check_duration), duration_field("1h")]
ProgressDeadline = Annotated[str, AfterValidator(check_duration), duration_field("24h", above_zero=True)]
Duration = Annotated[str, AfterValidator(check_duration), duration_field("168h")]

Quantity = Annotated[
    int | str,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            **rules(
                rule(
                    "type(self) == int || isQuantity(self)",
                    "not a quantity: write 1, 500m, 2Gi, …",
                ),
                rule(
                    "type(self) == int ? self >= 0 : !isQuantity(self) || !quantity(self).isLessThan(quantity('0'))",
                    "a quantity cannot be negative",
                ),
            ),
            "maxLength": 32,
        }
    ),
]
