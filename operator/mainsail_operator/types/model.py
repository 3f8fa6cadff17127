"""spec.model: which model, from where, under which names."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field

from mainsail_fetch import source
from mainsail_operator.types.schema import JSON, Model, Quantity, rule, rules

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
    if not (_PVC.fullmatch(value) or re.fullmatch(r"file:///[^/].*", value) or source.parse(value)):
        raise ValueError(f"{value!r} is none of hf://ORGANIZATION/NAME, s3://BUCKET/PREFIX, oci://REGISTRY/REPOSITORY, "
                         "pvc://CLAIM/PATH and file:///PATH")  # fmt: skip
    if ".." in value.split("/"):
        raise ValueError(f"{value!r} must not contain '..'")
    return value


def _matches(scheme: str, pattern: str, message: str) -> JSON:
    """A rule for URIs of one scheme. CEL's regular expressions know no names of groups in Python's spelling."""
    plain = re.sub(r"\(\?P<[a-z]+>", "(", pattern).replace("\\", "\\\\")
    return rule(f"!self.startsWith('{scheme}://') || self.matches('^{plain}$')", message)


Uri = Annotated[
    str,
    AfterValidator(_check_uri),
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(
            rule(
                "['hf://', 's3://', 'oci://', 'pvc://', 'file://'].exists(scheme, self.startsWith(scheme))",
                "unknown kind of model source: use hf://ORGANIZATION/NAME, s3://BUCKET/PREFIX, "
                "oci://REGISTRY/REPOSITORY:TAG, pvc://CLAIM/PATH (a PersistentVolumeClaim of this namespace) or "
                "file:///PATH (a path in the pod, mounted by spec.podTemplate)",
            ),
            _matches("hf", source.HF, "hf:// needs a repository of the Hugging Face Hub: hf://ORGANIZATION/NAME, or "
                     "hf://ORGANIZATION/NAME/FILE.gguf for one file of it"),
            _matches("s3", source.S3, "s3:// needs a bucket and a prefix in it: s3://BUCKET/PREFIX, or "
                     "s3://BUCKET/FILE.gguf for one object"),
            _matches("oci", source.OCI, "oci:// needs a registry and a repository: oci://REGISTRY/REPOSITORY:TAG, or "
                     "oci://REGISTRY/REPOSITORY@sha256:DIGEST"),
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
]  # fmt: skip

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


ObjectName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        json_schema_extra=rules(
            rule(
                "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
                "the name of an object: lower-case letters, digits, - and ., with a letter or digit at both ends",
            )
        ),
    ),
]


class SecretReference(Model):
    """A Secret of the service's namespace."""

    name: ObjectName = Field(description="The Secret's name.")


class CacheSpec(Model):
    """Where fetched models are kept, so that a replica starts from a disk and not from the network."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.claim) != has(self.nodePath)",
                "set one of cache.claim (a volume that all replicas share) and cache.nodePath (a folder on each node)",
            )
        )
    )

    claim: ObjectName | None = Field(
        default=None,
        description="A PersistentVolumeClaim of this namespace that all replicas can mount (ReadWriteMany, or one "
        "node). A Job fills it once, before any replica starts, so that no GPU waits for a download; ModelFetched "
        "shows how far it is. A change of the model fetches the new one while the old one serves.",
    )
    node_path: (
        Annotated[
            str,
            Field(
                max_length=512,
                json_schema_extra=rules(
                    rule(
                        "self.matches('^/[^/].*$') && !self.split('/').exists(part, part == '..')",
                        "nodePath is an absolute path on the nodes, without '..': /var/lib/mainsail/models",
                    )
                ),
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="A folder on the nodes, best on a local NVMe disk, that user 65534 can write. A DaemonSet fetches "
        "the model to every node that replicas may run on, ahead of need. The namespace must allow hostPath volumes "
        "(Pod Security `privileged`).",
    )
    limit: Quantity | None = Field(
        default=None,
        description="How much all models together may take there, as 500Gi. Before another one is fetched, those that "
        "no revision uses any more go, the least recently used first, until it fits. Changing it restarts nothing. "
        "Default: as much as the disk holds; what is in nobody's use goes when the disk is full.",
    )


_FETCHED = "['hf://', 's3://', 'oci://'].exists(scheme, self.uri.startsWith(scheme))"
_SECRET_RULE = rule(
    f"!has(self.secretRef) || {_FETCHED}",
    "secretRef is for what is fetched (hf://, s3://, oci://): remove it, pvc:// and file:// are mounted",
    path=".secretRef",
)


class AdapterSpec(Model):
    """A LoRA adapter beside the model."""

    model_config = ConfigDict(json_schema_extra=rules(_SECRET_RULE))

    name: ServedName = Field(description="What clients put in the request's `model` field to go through the adapter.")
    uri: Uri = Field(
        description="Where the adapter lies: a folder with adapter_config.json and adapter_model.safetensors, by the "
        "same kinds of URI as spec.model.uri. Fetched ones are fetched by each replica before it starts."
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="A Secret with what the source asks for, as spec.model.secretRef."
    )


class ModelSpec(Model):
    """Which model, and under which names clients ask for it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"!has(self.cache) || {_FETCHED}",
                "cache is for models that are fetched (hf://, s3://, oci://): the others are on a disk already",
                path=".cache",
            ),
            _SECRET_RULE,
            rule(
                "self.revision == 'main' || self.uri.startsWith('hf://')",
                "revision is for hf:// models: name the version of others in the URI",
                path=".revision",
            ),
        )
    )

    uri: Uri = Field(
        description="Where the model lies: a GGUF file, or a folder with config.json, tokenizer and safetensors. "
        "hf://ORGANIZATION/NAME: a repository of the Hugging Face Hub (…/FILE.gguf: one file of it). "
        "s3://BUCKET/PREFIX: objects in S3 or what speaks its protocol. "
        "oci://REGISTRY/REPOSITORY:TAG: the files of an artifact or image. These three are fetched, see "
        "cache and secretRef; what fails shows in ModelFetched within a minute. "
        "pvc://CLAIM/PATH mounts that PersistentVolumeClaim of this namespace read-only. file:///PATH is a path in the "
        "pod that spec.podTemplate mounts. A path that does not exist shows as ModelLoaded=False, reason ModelNotFound."
    )
    revision: str = Field(
        default="main",
        min_length=1,
        max_length=255,
        description="Branch, tag or commit of an hf:// repository. A branch is fetched once; name a commit, and change "
        "it, to roll out another version.",
        json_schema_extra=rules(
            rule(
                "self.matches('^[A-Za-z0-9][A-Za-z0-9._/-]*$')",
                "revision is the name of a branch or tag, or a commit",
            )
        ),
    )
    secret_ref: SecretReference | None = Field(
        default=None,
        description="A Secret with what the source asks for, under the names that its tools use: HF_TOKEN (and "
        "HF_ENDPOINT for a mirror); AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; "
        "OCI_USERNAME and OCI_PASSWORD, or type kubernetes.io/dockerconfigjson. Only what fetches sees it, "
        "not the engine. A Secret that is missing shows as ModelFetched=False, reason CreateContainerConfigError.",
    )
    cache: CacheSpec | None = Field(
        default=None,
        description="Where fetched models are kept. Default: nowhere, each replica fetches the model into its own "
        "temporary disk before it starts.",
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
