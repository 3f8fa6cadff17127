"""The InferenceService: what a user may ask for, and what the operator answers.

These models are the single source of the resource. `mainsail_operator.crd` turns them into the
CustomResourceDefinition, so a field's description here is what `kubectl explain mis.spec…` prints, its default is what
the API server fills in, and the rules beside it are what the API server refuses with. A description says what the field
is for, its unit, and the failure that it prevents.

One module for each noun: `schema` (what all share), `model`, `engine`, `pod`, `rollout`, `scaling`, `admission`,
`status`, and `service`, which puts them together.

Two rules keep upgrades harmless:

* A default never changes within an API version. Revisions are hashes over what differs from the defaults
  (`objects.revision_of`), so a changed default would restart every pod of everybody.
* Unknown fields are refused here as well, not only by the API server: an operator older than its CRD says so in a
  condition instead of dropping what a user asked for.
"""

from __future__ import annotations

from mainsail_operator.types.admission import AdmissionSpec
from mainsail_operator.types.engine import OWNED_FLAGS, EngineSpec, KvCacheSpec
from mainsail_operator.types.model import CacheSpec, ModelSpec, PvcSource, pvc_source
from mainsail_operator.types.pod import OWNED_LABELS, PodTemplateMetadata, PodTemplateSpec, ResourcesSpec
from mainsail_operator.types.rollout import DrainSpec, Phase, RolloutGate, RolloutSpec, RolloutStatus, RolloutStep
from mainsail_operator.types.scaling import ScaleDownSpec, ScalingSpec, ScalingTargets, ToZeroSpec, latency_s
from mainsail_operator.types.schema import API_VERSION, GROUP, JSON, KIND, PLURAL, VERSION, Model, rule, rules, seconds
from mainsail_operator.types.service import InferenceService, InferenceServiceSpec
from mainsail_operator.types.status import Capacity, Condition, InferenceServiceStatus, RevisionStatus, ScalingStatus

__all__ = [
    "API_VERSION",
    "GROUP",
    "JSON",
    "KIND",
    "OWNED_FLAGS",
    "OWNED_LABELS",
    "PLURAL",
    "VERSION",
    "AdmissionSpec",
    "CacheSpec",
    "Capacity",
    "Condition",
    "DrainSpec",
    "EngineSpec",
    "InferenceService",
    "InferenceServiceSpec",
    "InferenceServiceStatus",
    "KvCacheSpec",
    "Model",
    "ModelSpec",
    "Phase",
    "PodTemplateMetadata",
    "PodTemplateSpec",
    "PvcSource",
    "ResourcesSpec",
    "RevisionStatus",
    "RolloutGate",
    "RolloutSpec",
    "RolloutStatus",
    "RolloutStep",
    "ScaleDownSpec",
    "ScalingSpec",
    "ScalingStatus",
    "ScalingTargets",
    "ToZeroSpec",
    "latency_s",
    "pvc_source",
    "rule",
    "rules",
    "seconds",
]
