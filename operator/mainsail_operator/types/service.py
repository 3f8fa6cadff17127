"""The InferenceService itself: spec and status in one object."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from mainsail_operator.types.admission import AdmissionSpec
from mainsail_operator.types.engine import EngineSpec
from mainsail_operator.types.model import AdapterSpec, ModelSpec
from mainsail_operator.types.pod import PodTemplateSpec, ResourcesSpec
from mainsail_operator.types.rollout import DrainSpec, RolloutSpec
from mainsail_operator.types.scaling import ScalingSpec
from mainsail_operator.types.schema import Model, rule, rules
from mainsail_operator.types.status import InferenceServiceStatus

GROUPED_NAME = 37
"""A StatefulSet's name may have 52 characters, as its pods' label for its revision has 11 more; a group's has the
revision (11) and the group's number (up to 4) besides the service's name."""


class InferenceServiceSpec(Model):
    """What the user asks for."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.scaling) || self.replicas == 1",
                "spec.replicas and spec.scaling exclude one another: with scaling the operator decides between "
                "scaling.min and scaling.max, so remove replicas (set it to 1, where kubectl scale or an autoscaler "
                "has written it); or remove scaling to set replicas by hand, by kubectl scale or by an autoscaler of "
                "your own",
                path=".replicas",
            ),
            rule(
                "!has(self.resources) || !has(self.resources.limits) || "
                "!('nvidia.com/gpu' in self.resources.limits) || string(self.resources.limits['nvidia.com/gpu']) == "
                "string(has(self.engine) ? self.engine.tensorParallelSize : 1)",
                "each GPU of a pod is one part of the model: set resources.limits['nvidia.com/gpu'] and "
                "engine.tensorParallelSize to the same number, or leave the limit out",
                path=".resources",
            ),
        )
    )

    model: ModelSpec = Field(description="The model to serve.")
    adapters: list[AdapterSpec] = Field(
        default_factory=list[AdapterSpec],
        max_length=16,
        description="LoRA adapters that every replica serves beside the model, each under a name of its own; requests "
        "of different adapters run in one batch. A change rolls out as any other.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    engine: EngineSpec = Field(default_factory=EngineSpec, description="How the engine runs the model.")
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec,
        description="Resources of each replica. Default, when empty: as many GPUs as engine.tensorParallelSize says. "
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
        "restarts a pod; `kubectl scale`, a HorizontalPodAutoscaler and KEDA write it through the scale subresource. "
        "Beside `scaling`, which then decides instead, leave it out.",
    )
    scaling: ScalingSpec | None = Field(
        default=None,
        description="Lets the operator choose the number of replicas by load: queues, KV cache, preemptions, latency, "
        "agents' sessions. It never writes the spec, so GitOps sees no drift; status.scaling says what it chose, and "
        "why. Default: spec.replicas is the number.",
    )
    admission: AdmissionSpec = Field(
        default_factory=AdmissionSpec,
        description="What the gateway does with more requests than the service can serve.",
    )
    drain: DrainSpec = Field(default_factory=DrainSpec, description="How a replica ends.")
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, description="How a change of the spec reaches the pods.")


class InferenceService(Model):
    """A model behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "the name becomes a Service and the prefix of Deployments: at most 50 lower-case letters, digits and "
                "-, beginning with a letter",
            ),
            rule(
                f"!has(self.spec.engine) || self.spec.engine.pipelineParallelSize == 1 || "
                f"self.metadata.name.size() <= {GROUPED_NAME}",
                "with engine.pipelineParallelSize the name becomes part of StatefulSets, whose pods carry it in a "
                f"label: at most {GROUPED_NAME} characters",
            ),
        )
    )

    spec: InferenceServiceSpec = Field(description="What the user asks for.")
    status: InferenceServiceStatus | None = Field(default=None, description="What the operator last saw.")
