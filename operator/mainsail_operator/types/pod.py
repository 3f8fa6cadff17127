"""spec.resources and spec.podTemplate: what a pod needs besides what the operator gives it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from mainsail_operator.types.schema import GROUP, JSON, Model, Quantity, rule, rules

_LABEL_VALUE = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
OWNED_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by")


class ResourcesSpec(Model):
    """What the scheduler sets aside for each replica, as in a container's `resources`."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits) || "
                "!isQuantity(string(self.requests[name])) || !isQuantity(string(self.limits[name])) || "
                "quantity(string(self.requests[name])).compareTo(quantity(string(self.limits[name]))) <= 0)",
                "a request is larger than its limit: lower the request or raise the limit",
            ),
            rule(
                "!has(self.requests) || !('nvidia.com/gpu' in self.requests) || (has(self.limits) && "
                "'nvidia.com/gpu' in self.limits && "
                "string(self.limits['nvidia.com/gpu']) == string(self.requests['nvidia.com/gpu']))",
                "GPUs cannot be overcommitted: set limits['nvidia.com/gpu'] to the same number as the request, "
                "or only the limit",
            ),
        )
    )

    requests: dict[str, Quantity] = Field(
        default_factory=dict[str, Quantity],
        max_length=16,
        description="Guaranteed amount per resource name. Too low a memory request lets the node kill the engine.",
    )
    limits: dict[str, Quantity] = Field(
        default_factory=dict[str, Quantity],
        max_length=16,
        description="Most that a replica may use per resource name. nvidia.com/gpu goes here.",
    )


class PodTemplateMetadata(Model):
    """Labels and annotations that every pod gets besides the operator's own."""

    labels: dict[str, Annotated[str, Field(max_length=63, pattern=_LABEL_VALUE)]] = Field(
        default_factory=dict[str, str],
        max_length=64,
        description="Further labels of the pods.",
        json_schema_extra=rules(
            rule(
                f"self.all(key, !key.startsWith('{GROUP}/') && !(key in {list(OWNED_LABELS)}))",
                f"labels under {GROUP}/ and app.kubernetes.io/name, instance and managed-by belong to the operator: "
                "use a prefix of your own",
            )
        ),
    )
    annotations: dict[str, str] = Field(
        default_factory=dict[str, str], max_length=64, description="Further annotations of the pods."
    )


_CONTAINERS: JSON = {
    "type": "array",
    "maxItems": 16,
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["name"],
    "items": {
        "type": "object",
        "required": ["name"],
        "x-kubernetes-preserve-unknown-fields": True,
        "properties": {
            "name": {
                "type": "string",
                "maxLength": 63,
                "description": "Its name; one of a container that the operator makes changes that one.",
            },
            "command": {
                "type": "array",
                "maxItems": 64,
                "items": {"type": "string"},
                "description": "What runs in it, in place of the image's entry point. Not of container `engine`.",
            },
            "args": {
                "type": "array",
                "maxItems": 256,
                "items": {"type": "string"},
                "description": "The arguments of that. Not of container `engine`: use spec.engine.extraArgs.",
            },
        },
    },
}

_POD_SPEC: JSON = {
    "type": "object",
    "x-kubernetes-preserve-unknown-fields": True,
    "description": "Fields of a PodSpec. Containers, environment variables, volumes and image pull secrets are merged "
    "by name, volume mounts by path, tolerations and topology spread constraints are added to the list, everything "
    "else replaces the operator's value. The engine's container is called `engine`.",
    "properties": {
        "containers": _CONTAINERS | {"description": "Merged by name; `engine` is the engine's own container."},
        "initContainers": _CONTAINERS | {"description": "Run before the engine, in this order."},
        "restartPolicy": {"type": "string", "description": "Always; anything else is refused."},
        "terminationGracePeriodSeconds": {"type": "integer", "description": "Computed from spec.drain.timeout."},
    },
    "x-kubernetes-validations": [
        rule(
            "!has(self.containers) || self.containers.all(c, c.name != 'engine' || (!has(c.command) && !has(c.args)))",
            "the command and the args of container `engine` belong to the operator: use spec.engine.extraArgs",
        ),
        rule(
            "!has(self.terminationGracePeriodSeconds)",
            "terminationGracePeriodSeconds is computed, so that a drain always fits into it: set spec.drain.timeout",
        ),
        rule(
            "!has(self.restartPolicy) || self.restartPolicy == 'Always'",
            "restartPolicy must be Always: replicas of a service run until they are replaced",
        ),
    ],
}


class PodTemplateSpec(Model):
    """What a pod needs besides what the operator gives it: node selectors, tolerations, environment, volumes, …"""

    metadata: PodTemplateMetadata = Field(
        default_factory=PodTemplateMetadata, description="Further labels and annotations of the pods."
    )
    spec: dict[str, Any] = Field(default_factory=dict[str, Any], json_schema_extra={"x-mainsail-schema": _POD_SPEC})
