"""LoRA adapters of an InferenceService: each a model of its own behind the gateway, of one and the same pod."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from e2e import tiny
from e2e.cluster.place import Place
from e2e.kube import Kube, condition, wait_for
from e2e.services import client, pods, service, wait_ready, wait_routed

NAME = "adapted"


def write_adapter(folder: Path, seed: int) -> None:
    """In PEFT's form, for the tiny model's queries and outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for module in ("q_proj", "o_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(4, 64, generator=random)
            tensors[f"{at}.lora_B.weight"] = torch.randn(64, 4, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_adapters_are_models_behind_the_gateway(cluster: Place, kube: Kube, gateway_url: str) -> None:
    tiny.write(cluster.models / "tiny")
    for seed, name in enumerate(("pirate", "poet"), 1):
        write_adapter(cluster.models / name, seed)
    asked = service(NAME, uri="pvc://models/tiny")
    asked["spec"]["adapters"] = [{"name": name, "uri": f"pvc://models/{name}"} for name in ("pirate", "poet")]
    try:
        kube.apply(asked)
        wait_ready(kube, NAME)
        texts: dict[str, str] = {}
        with client(gateway_url) as api:
            for name in (NAME, "pirate", "poet"):
                wait_routed(gateway_url, name)
                answer = api.completions.create(model=name, prompt="Ahoy", max_tokens=24, temperature=0)
                texts[name] = answer.choices[0].text
            assert {model.id for model in api.models.list()} >= set(texts)
        assert len(set(texts.values())) == 3, texts
        assert len(pods(kube, NAME)) == 1
        asked["spec"]["adapters"] += [{"name": "lost", "uri": "hf://org/lost", "secretRef": {"name": "nobodys"}}]
        kube.apply(asked)
        obj = wait_for("what is wrong with it", lambda: "nobodys" in condition(found := kube.get("mis", NAME),
                       "AdaptersLoaded").get("message", "") and found, story=kube.story)  # fmt: skip
        told = condition(obj, "AdaptersLoaded")
        assert told["status"] == "False"
        assert "hf://org/lost" in told["message"]
        assert condition(obj, "Stalled")["reason"] == told["reason"]
        assert condition(obj, "Ready")["status"] == "True"
    finally:
        kube.delete("mis", NAME)
