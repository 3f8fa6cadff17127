"""The InferenceService: what a user may ask for, and what the operator answers.

These models are the single source of the resource. `mainsail_operator.crd` turns them into the
CustomResourceDefinition, so a field's description here is what `kubectl explain mis.spec…` prints, its default is what
the API server fills in, and the rules beside it are what the API server refuses with. A description says what the field
is for, its unit, and the failure that it prevents.

Two rules keep upgrades harmless:

* A default never changes within an API version. Revisions are hashes over what differs from the defaults
  (`objects.revision_of`), so a changed default would restart every pod of everybody.
* Unknown fields are refused here as well, not only by the API server: an operator older than its CRD says so in a
  condition instead of dropping what a user asked for.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "mainsail.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"

JSON = dict[str, Any]

# Each flag of the engine that a field or the operator owns, and what to set instead.
OWNED_FLAGS: dict[str, str] = {
    "--model": "spec.model.uri",
    "--served-model-name": "spec.model.servedNames",
    "--max-model-len": "spec.engine.maxModelLen",
    "--max-num-seqs": "spec.engine.maxNumSeqs",
    "--max-num-batched-tokens": "spec.engine.maxBatchedTokens",
    "--dtype": "spec.engine.dtype",
    "--load-format": "spec.engine.loadFormat",
    "--gpu-memory-utilization": "spec.engine.kvCache.memoryFraction",
    "--kv-cache-blocks": "spec.engine.kvCache.blocks",
    "--enable-prefix-caching": "spec.engine.kvCache.prefixCaching",
    "--no-enable-prefix-caching": "spec.engine.kvCache.prefixCaching",
    "--drain-timeout": "spec.drain.timeout",
    "--host": "nothing (the operator owns it)",
    "--port": "nothing (the operator owns it)",
    "--health-port": "nothing (the operator owns it)",
}

OWNED_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by")

_DURATION = re.compile(r"(?=.)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_PVC = re.compile(r"pvc://(?P<claim>[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?)/(?P<path>[^/].*)")


def seconds(duration: str) -> int:
    """`2m30s` → 150. Raises ValueError for anything but hours, minutes and whole seconds in that order."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a duration: write it as 90s, 2m30s or 1h")
    hours, minutes, secs = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + secs


class PvcSource(NamedTuple):
    """A PersistentVolumeClaim of the service's namespace and a path in it."""

    claim: str
    path: str


def pvc_source(uri: str) -> PvcSource | None:
    """The parts of a pvc:// URI; None for another kind of source."""
    match = _PVC.fullmatch(uri)
    return PvcSource(match["claim"], match["path"]) if match else None


def _check_duration(value: str) -> str:
    seconds(value)
    return value


def _check_uri(value: str) -> str:
    if not (_PVC.fullmatch(value) or re.fullmatch(r"file:///[^/].*", value)):
        raise ValueError(f"{value!r} is neither pvc://CLAIM/PATH nor file:///PATH")
    if ".." in value.split("/"):
        raise ValueError(f"{value!r} must not contain '..'")
    return value


def rule(expression: str, message: str, *, computed: bool = False, path: str | None = None) -> JSON:
    """One CEL rule of the CRD. `computed` messages are CEL expressions themselves."""
    found: JSON = {"rule": expression, "messageExpression" if computed else "message": message}
    return found | ({"fieldPath": path} if path else {})


def _rules(*rules: JSON, **more: Any) -> JSON:
    return {"x-kubernetes-validations": list(rules), **more}


class Model(BaseModel):
    """Frozen, camelCase on the wire, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


Uri = Annotated[
    str,
    AfterValidator(_check_uri),
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=_rules(
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
        json_schema_extra=_rules(
            rule(
                "self.matches('^[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?$')",
                "a served name begins and ends with a letter or digit and holds only letters, digits and . _ : / -",
            )
        ),
    ),
]

_DURATION_RULE = rule(
    "self.matches('^([0-9]+h)?([0-9]+m)?([0-9]+s)?$') && self != ''", "write a duration as 90s, 2m30s or 1h"
)
_DURATION_CEL = "!self.matches('^([0-9]+h)?([0-9]+m)?([0-9]+s)?$') || self == '' || "


def _duration_field(most: str) -> Any:
    bound = rule(f"{_DURATION_CEL}duration(self) <= duration('{most}')", f"at most {most}")
    return Field(max_length=16, json_schema_extra=_rules(_DURATION_RULE, bound))


DrainTimeout = Annotated[str, AfterValidator(_check_duration), _duration_field("1h")]
ProgressDeadline = Annotated[str, AfterValidator(_check_duration), _duration_field("24h")]

Quantity = Annotated[
    int | str,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            **_rules(
                rule(
                    "type(self) == int || isQuantity(self)",
                    "not a quantity: write 1, 500m, 2Gi, …",
                )
            ),
            "maxLength": 32,
        }
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
            **_rules(
                rule(
                    "self.all(x, self.exists_one(y, x == y))",
                    "servedNames holds a name twice: list each name once",
                )
            ),
        },
    )


class KvCacheSpec(Model):
    """The memory that holds the keys and values of running sequences."""

    memory_fraction: float = Field(
        default=0.92,
        description="Share of the accelerator's memory that weights, activations and KV cache may use together, "
        "0 to 1. Too high fails at start with reason OutOfMemory; too low preempts sequences under load. "
        "Without an accelerator it has no effect.",
        json_schema_extra=_rules(
            rule(
                "self > 0.0 && self <= 1.0",
                "memoryFraction is a share of the accelerator's memory: more than 0 and at most 1, for example 0.92",
            )
        ),
    )
    blocks: int | None = Field(
        default=None,
        ge=2,
        le=100_000_000,
        description="Number of KV cache blocks, instead of deriving it from memoryFraction. For tests and for "
        "machines without an accelerator. Default: derived.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Keep the KV of finished prompts and reuse it for prompts that begin alike. Saves the prefill of "
        "shared system prompts; costs nothing but memory that nobody else wants.",
    )


class EngineSpec(Model):
    """How the engine runs the model. Every field has a default that suits most models."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            rule(
                "!has(self.maxBatchedTokens) || self.maxBatchedTokens >= self.maxNumSeqs",
                "maxBatchedTokens must be at least maxNumSeqs: every running sequence needs one token in each step",
                path=".maxBatchedTokens",
            )
        )
    )

    max_model_len: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Longest prompt plus answer, in tokens. Default: what the model was trained for. Lower it when the "
        "KV cache cannot hold one sequence of full length (the engine then fails with reason OutOfMemory).",
    )
    max_num_seqs: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="Most sequences in one step. More raises throughput and the time between tokens. Others wait.",
    )
    max_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Token budget of one step, shared by prefill chunks and decodes. A larger one shortens the time to "
        "the first token of long prompts; a smaller one keeps running streams smooth while prompts are prefilled. "
        "Default: 8192, or 512 without an accelerator.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of weights and activations. auto takes the model's own, and float32 where the "
        "hardware is slow in it (a CPU).",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto loads the weights. dummy makes random ones of the right shapes, to test capacity and "
        "rollouts without the download; its answers are noise.",
    )
    kv_cache: KvCacheSpec = Field(default_factory=KvCacheSpec, description="The KV cache: its size and its reuse.")
    extra_args: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(
        default_factory=list[str],
        max_length=64,
        description="Further arguments of `mainsail-engine serve`, for flags that no field covers. An argument that "
        "the engine does not know shows as ModelLoaded=False with the engine's message.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            **_rules(
                rule(
                    f"self.all(arg, !(arg.split('=')[0] in {list(OWNED_FLAGS)}))",
                    "'extraArgs repeats a flag that a field owns: remove '"
                    f" + self.filter(arg, arg.split('=')[0] in {list(OWNED_FLAGS)})[0].split('=')[0]"
                    " + ' and set '"
                    f" + {OWNED_FLAGS}"
                    f"[self.filter(arg, arg.split('=')[0] in {list(OWNED_FLAGS)})[0].split('=')[0]]",
                    computed=True,
                )
            ),
        },
    )


class ResourcesSpec(Model):
    """What the scheduler sets aside for each replica, as in a container's `resources`."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
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

    labels: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default_factory=dict[str, str],
        max_length=64,
        description="Further labels of the pods.",
        json_schema_extra=_rules(
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
            "name": {"type": "string", "maxLength": 63},
            "command": {"type": "array", "maxItems": 64, "items": {"type": "string"}},
            "args": {"type": "array", "maxItems": 256, "items": {"type": "string"}},
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


class DrainSpec(Model):
    """How a replica ends."""

    timeout: DrainTimeout = Field(
        default="120s",
        description="How long a replica that is to end may finish its running requests, as 90s, 2m30s or 1h. After it, "
        "the rest is cut off. The pod's grace period is always above it, so the node never kills a drain midway.",
    )


class RolloutSpec(Model):
    """How a change of the spec reaches the pods."""

    progress_deadline: ProgressDeadline = Field(
        default="15m",
        description="How long a new revision may go without any progress before Stalled says so, as 90s, 15m or 1h. "
        "Longer than the longest load of a model on a cold node. The old revision serves on meanwhile.",
    )


class InferenceServiceSpec(Model):
    """What the user asks for."""

    model: ModelSpec = Field(description="The model to serve.")
    engine: EngineSpec = Field(default_factory=EngineSpec, description="How the engine runs the model.")
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec,
        description="Resources of each replica. Default, when empty: one GPU (limits: nvidia.com/gpu: 1). "
        "Name only cpu and memory to run without a GPU.",
    )
    pod_template: PodTemplateSpec = Field(
        default_factory=PodTemplateSpec,
        description="Merged into the pods that the operator makes: nodeSelector, tolerations, environment, volumes, "
        "sidecars, another image for container `engine`.",
    )
    replicas: int = Field(
        default=1,
        ge=0,
        le=10_000,
        description="Number of pods that serve. 0 keeps the service's address and stops all pods. Changing it never "
        "restarts a pod; `kubectl scale` and autoscalers write it.",
    )
    drain: DrainSpec = Field(default_factory=DrainSpec, description="How a replica ends.")
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, description="How a change of the spec reaches the pods.")


class RevisionStatus(Model):
    """One revision that has pods."""

    name: str = Field(description="The revision's Deployment.")
    replicas: int = Field(description="Pods of it that exist and are not ending.")
    serving: int = Field(description="Pods of it that answer requests.")
    weight: int = Field(description="Share of the requests that it gets, in percent.")


class Condition(Model):
    """One aspect of the service's state, with a stable reason to build on and a message to read."""

    type: str = Field(
        max_length=64,
        description="Ready: it answers requests. ModelLoaded: the newest revision has loaded its model. "
        "RolloutComplete: only the newest revision is left and all its replicas serve. Reconciling (only while True): "
        "work is under way. Stalled (only while True): it will not proceed without a change.",
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=128, description="Why, in one stable word.")
    message: str = Field(max_length=2048, description="Why, for people: what is wrong, where, and what to do.")
    observed_generation: int = Field(description="The metadata.generation that this was decided on.")
    last_transition_time: str = Field(
        description="When the status last changed.", json_schema_extra={"format": "date-time"}
    )


class InferenceServiceStatus(Model):
    """What the operator last saw. Conforms to kstatus: `observedGeneration`, Reconciling, Stalled."""

    observed_generation: int = Field(
        default=0, description="The metadata.generation that this status is about; older means not looked at yet."
    )
    url: str = Field(default="", description="Base URL of the OpenAI API in the cluster, for this service alone.")
    replicas: int = Field(default=0, description="Pods of all revisions that exist and are not ending.")
    serving_replicas: int = Field(default=0, description="Pods of all revisions that answer requests.")
    selector: str = Field(default="", description="Label selector of the pods, for the scale subresource.")
    revisions: list[RevisionStatus] = Field(
        default_factory=list[RevisionStatus],
        description="Revisions with pods, the newest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    conditions: list[Condition] = Field(
        default_factory=list[Condition],
        description="Ready, ModelLoaded, RolloutComplete; Reconciling and Stalled only while they are True.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )


class InferenceService(Model):
    """A model behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            rule(
                "self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "the name becomes a Service and the prefix of Deployments: at most 50 lower-case letters, digits and "
                "-, beginning with a letter",
            )
        )
    )

    spec: InferenceServiceSpec = Field(description="What the user asks for.")
    status: InferenceServiceStatus | None = Field(default=None, description="What the operator last saw.")
