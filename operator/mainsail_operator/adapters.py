"""How LoRA adapters come to the engine's pods: pure builders.

    hf://, s3://, oci://   an init container for each fetches it into the pod's own disk: adapters are small
    pvc://                 the claim is mounted read-only
    file://                spec.podTemplate mounts it

They are part of the revision, as the model is: a change rolls out behind the same gate.
"""

from __future__ import annotations

from mainsail_fetch.source import parse
from mainsail_operator import fetching
from mainsail_operator.settings import Settings
from mainsail_operator.types import JSON, InferenceServiceSpec, pvc_source
from mainsail_operator.types.model import AdapterSpec

FETCH_ADAPTER = f"{fetching.CONTAINER}-adapter-"
"""Prefix of the init containers that fetch adapters."""
_ROOT = "/adapters"
_VOLUME = "adapters"


def arguments(spec: InferenceServiceSpec) -> list[str]:
    """The engine's flags; more in spec.engine.extraArgs, such as --max-lora-rank."""
    if not spec.adapters:
        return []
    modules = [f"{adapter.name}={_path(index, adapter)}" for index, adapter in enumerate(spec.adapters)]
    return ["--enable-lora", "--max-loras", str(max(8, len(modules))), "--lora-modules", *modules]


def _path(index: int, adapter: AdapterSpec) -> str:
    if _is_fetched(adapter):
        return f"{_ROOT}/{index}"
    source = pvc_source(adapter.uri)
    return f"{_ROOT}-{index}/{source.path}" if source else adapter.uri.removeprefix("file://")


def _is_fetched(adapter: AdapterSpec) -> bool:
    return parse(adapter.uri) is not None


def init_containers(spec: InferenceServiceSpec, settings: Settings) -> list[JSON]:
    found: list[JSON] = []
    for index, adapter in enumerate(spec.adapters):
        if _is_fetched(adapter):
            one = fetching.fetcher(
                f"{FETCH_ADAPTER}{index}", [adapter.uri, f"{_ROOT}/{index}"], adapter.secret_ref, settings
            )
            one["volumeMounts"].append({"name": _VOLUME, "mountPath": _ROOT})
            found.append(one)
    return found


def mounts(spec: InferenceServiceSpec) -> list[JSON]:
    """Of the engine's container."""
    found: list[JSON] = []
    if any(map(_is_fetched, spec.adapters)):
        found.append({"name": _VOLUME, "mountPath": _ROOT, "readOnly": True})
    for index, adapter in enumerate(spec.adapters):
        if pvc_source(adapter.uri):
            found.append({"name": f"{_VOLUME}-{index}", "mountPath": f"{_ROOT}-{index}", "readOnly": True})
    return found


def volumes(spec: InferenceServiceSpec) -> list[JSON]:
    found: list[JSON] = [{"name": _VOLUME, "emptyDir": {}}] if any(map(_is_fetched, spec.adapters)) else []
    for index, adapter in enumerate(spec.adapters):
        if source := pvc_source(adapter.uri):
            claim = {"claimName": source.claim, "readOnly": True}
            found.append({"name": f"{_VOLUME}-{index}", "persistentVolumeClaim": claim})
    return found
