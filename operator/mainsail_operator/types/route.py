"""The ModelRoute: a model's name that stands for several services, by rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mainsail_operator.types.model import ServedName
from mainsail_operator.types.schema import Model, rule, rules
from mainsail_operator.types.status import Condition

ROUTE_KIND = "ModelRoute"
ROUTE_PLURAL = "modelroutes"

ObjectName = Annotated[str, Field(min_length=1, max_length=63)]
Event = Literal["Overloaded", "Down", "SchemaFailure"]


class SecretKeyRef(Model):
    """One entry of a Secret of the route's namespace."""

    name: ObjectName = Field(description="The Secret. It needs the label mainsail.dev/upstream-key.")
    key: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="key", description="The entry that holds the API key."
    )


class ExternalTarget(Model):
    """An OpenAI-compatible endpoint outside of the cluster, as a last resort."""

    url: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        description="Base URL with its version, as https://api.example.com/v1.",
        json_schema_extra=rules(
            rule(
                "isURL(self) && (self.startsWith('https://') || self.startsWith('http://')) && !self.contains('?')",
                "url is a base URL, as https://api.example.com/v1",
            )
        ),
    )
    model: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        description="The model to ask for there. The answer's `model` names it."
    )
    secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Its API key. The gateway reads Secrets only in the namespaces that the chart's "
        "gateway.externalNamespaces lists. Default: no key is sent.",
    )


class RouteTarget(Model):
    """Who may answer: a service of the route's namespace, or an endpoint outside."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.service) != has(self.external)",
                "a target has either a service (an InferenceService of this namespace) or an external endpoint",
            )
        )
    )

    service: ObjectName | None = Field(default=None, description="An InferenceService of this namespace.")
    external: ExternalTarget | None = Field(default=None, description="An OpenAI-compatible endpoint outside.")
    weight: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Share among the targets of the same list. 0 gets nothing. Sessions stay with their target. "
        "Ignored in a fallback, which is tried in order.",
    )


class HeaderMatch(Model):
    """A header of the request."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(description="Its name, in any case.")
    value: Annotated[str, Field(max_length=256)] = Field(description="Its value, exactly.")


class RouteMatch(Model):
    """What a request must be like; all that is set must hold."""

    min_prompt_tokens: int | None = Field(
        default=None,
        ge=0,
        le=100_000_000,
        description="The prompt has at least so many tokens, counted as 4 bytes each.",
    )
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=0,
        le=100_000_000,
        description="The prompt has at most so many tokens, counted as 4 bytes each.",
    )
    tools: bool | None = Field(default=None, description="The request does, or does not, offer tools.")
    structured: bool | None = Field(
        default=None, description="The request does, or does not, ask for JSON (response_format)."
    )
    profile: Literal["Latency", "Bulk"] | None = Field(
        default=None,
        description="Bulk: the request's priority is below normal, as of batch work. Latency: it is not. Bulk work "
        "may go where it costs less and disturbs nobody.",
    )
    header: HeaderMatch | None = Field(default=None, description="The request has this header.")


_FITS_ALL = "!has(r.when) || (" + " && ".join(f"!has(r.when.{f.alias})" for f in RouteMatch.model_fields.values()) + ")"


class RouteRule(Model):
    """Where requests of a kind go, and where they go then."""

    when: RouteMatch | None = Field(default=None, description="Which requests. Default: all.")
    to: list[RouteTarget] = Field(
        min_length=1,
        max_length=8,
        description="Who answers: one of these, by weight.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            **rules(rule("self.exists(t, t.weight > 0)", "all weights are 0: nobody would answer")),
        },
    )
    fallback: list[RouteTarget] = Field(
        default_factory=list[RouteTarget],
        max_length=8,
        description="Who is asked instead, in this order, when one of `fallbackOn` happens before an answer has begun.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    fallback_on: list[Event] = Field(
        default_factory=lambda: ["Overloaded", "Down"],
        max_length=3,
        description="Overloaded: the request was refused with 429, or would wait too long. Down: no replica serves, "
        "or none could answer. SchemaFailure: an answer that is not streamed does not fit the JSON schema that the "
        "request asked for; such answers are kept back until they are whole. A small model is so asked first, and a "
        "larger one only when it fails.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )


class ModelRouteSpec(Model):
    """The names, and the rules in order."""

    names: list[ServedName] = Field(
        default_factory=list[ServedName],
        max_length=16,
        description="The names that clients put in the request's `model` field. Default: metadata.name. A name that an "
        "InferenceService has too goes to the older object.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    rules: list[RouteRule] = Field(
        min_length=1,
        max_length=16,
        description="The first rule that fits decides. A request that fits none is refused with 404.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            **rules(
                rule(
                    f"self.filter(r, {_FITS_ALL}).size() <= 1 && (!self.exists(r, {_FITS_ALL}) || "
                    f"[self[size(self) - 1]].exists(r, {_FITS_ALL}))",
                    "a rule without `when` fits everything: it must be the last one",
                )
            ),
        },
    )


class ModelRouteStatus(Model):
    """What the operator last saw."""

    observed_generation: int = Field(
        default=0, description="The metadata.generation that this status is about; older means not looked at yet."
    )
    names: list[str] = Field(default_factory=list[str], description="The names under which the route is asked for.")
    conditions: list[Condition] = Field(
        default_factory=list[Condition],
        description="Ready: every target exists.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )


class ModelRoute(Model):
    """A model's name that stands for several services, by rule: weights, cheap first, bulk apart, fallbacks."""

    spec: ModelRouteSpec = Field(description="What the user asks for.")
    status: ModelRouteStatus | None = Field(default=None, description="What the operator last saw.")
