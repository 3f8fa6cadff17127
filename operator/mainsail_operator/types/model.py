"""spec.model: which model, from where, under which names."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from mainsail_operator.types.schema import Model, rule, rules

_PVC = re.compile(r"pvc://(?P<claim>[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?)/(?P<path>[^/].*)")


class PvcSource(NamedTuple):
    """A PersistentVolumeClaim of the service's namespace and a path in it."""

    claim: str
    path: str


def pvc_source(uri: str) -> PvcSource | None:
    """The parts of a pvc:// URI; None for another kind of source."""
    match = _PVC.fullmatch(uri)
    return PvcSource(match["claim"], match["path"]) if match else None


def _check_uri(value: str) -> str:
    if not (_PVC.fullmatch(value) or re.fullmatch(r"file:///[^/].*", value)):
        raise ValueError(f"{value!r} is neither pvc://CLAIM/PATH nor file:///PATH")
    if ".." in value.split("/"):
        raise ValueError(f"{value!r} must not contain '..'")
    return value


Uri = Annotated[
    str,
    AfterValidator(_check_uri),
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(
            rule(
                "self.startsWith('pvc://') || self.startsWith('file://')",
                "unknown kind of model source: use pvc://CLAIM/PATH (a PersistentVolumeClaim of this namespace) or "
                "file:///PATH (a path in the pod, mounted by spec.podTemplate)",
            ),
            rule(
                "!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[^/].*$')",
                "pvc:// needs the claim's name and a path in it: pvc://CLAIM/PATH (pvc://CLAIM/. is the claim's root)",
            ),
            rule(
                "!self.startsWith('file://') || self.matches('^file:///[^/].*$')",
                "file:// needs an absolute path, so three slashes: file:///PATH",
            ),
            rule("!self.split('/').exists(part, part == '..')", "the path must not contain '..'"),
        ),
    ),
]

ServedName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        json_schema_extra=rules(
            rule(
                "self.matches('^[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?$')",
                "a served name begins and ends with a letter or digit and holds only letters, digits and . _ : / -",
            )
        ),
    ),
]


class ModelSpec(Model):
    """Which model, and under which names clients ask for it."""

    uri: Uri = Field(
        description="Where the weights lie: a GGUF file or a folder with config.json, tokenizer and safetensors. "
        "pvc://CLAIM/PATH mounts that PersistentVolumeClaim of this namespace read-only. file:///PATH is a path in the "
        "pod that spec.podTemplate mounts. A path that does not exist shows as ModelLoaded=False, reason ModelNotFound."
    )
    served_names: list[ServedName] = Field(
        default_factory=list[ServedName],
        max_length=16,
        description="The names that clients put in the request's `model` field, first one preferred. Default: "
        "metadata.name. Names must be unique in the cluster, else the gateway picks the oldest service.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            **rules(
                rule(
                    "self.all(x, self.exists_one(y, x == y))",
                    "servedNames holds a name twice: list each name once",
                )
            ),
        },
    )
