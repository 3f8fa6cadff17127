import json
from pathlib import Path

import pytest
from e2e.steps import StepError

from e2e import product


def target(engine: str) -> product.Target:
    nowhere = Path("/nowhere")
    return product.Target(kubectl=nowhere, helm=nowhere, kubeconfig=nowhere, logs=nowhere, engine_image=engine,
                          control_plane_image="localhost/mainsail-control-plane:dev")  # fmt: skip


def chunk(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n"


def test_pieces_of_a_stream():
    lines = [chunk("Pa"), "\n", ": comment\n", chunk("ris"), 'data: {"choices": []}\n', "data: [DONE]\n"]
    assert "".join(product.pieces(iter(lines))) == "Paris"


def test_a_stream_without_its_end_is_an_error():
    with pytest.raises(StepError, match="broke off"):
        list(product.pieces(iter([chunk("Pa")])))


def test_an_error_in_the_stream_is_an_error():
    with pytest.raises(StepError, match="no capacity"):
        list(product.pieces(iter(['data: {"error": {"message": "no capacity"}}\n'])))


def test_ready_counts_only_for_the_newest_spec():
    found = {"metadata": {"generation": 2},
             "status": {"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "True"}]}}  # fmt: skip
    assert not product.is_ready(found)
    found["status"]["observedGeneration"] = 2
    assert product.is_ready(found)
    assert not product.is_ready({"metadata": {"generation": 1}})


def test_image_names_become_repository_and_tag():
    values = product.image_values(target("registry.example:5000/mainsail/engine:1.0"))
    assert "engine.image.repository=registry.example:5000/mainsail/engine,engine.image.tag=1.0" in values


@pytest.mark.parametrize("name", ["engine", "registry.example:5000/engine"])
def test_an_image_without_a_tag_is_refused(name: str):
    with pytest.raises(StepError, match="has no tag"):
        product.image_values(target(name))
