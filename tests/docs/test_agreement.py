"""Rooms that may not import one another agree on names: flags of the engine, metrics that one tells and one reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.docs import metrics_page

from mainsail_engine.cli import build_parser, engine_config, server_config
from mainsail_operator import objects
from mainsail_operator.signals import GATEWAY_FIRST_TOKEN, GATEWAY_INTER_TOKEN, GATEWAY_REQUESTS
from mainsail_operator.types import OWNED_FLAGS, InferenceServiceSpec

OPERATOR = Path(__file__).parents[2] / "operator"
USERS_TOO = {"--kv-events-config", "--enable-lora", "--max-loras", "--lora-modules"}
"""Flags that the operator gives and a user may give again: what comes last wins, adapters add up."""
ONE_POD = {
    "model": {"uri": "pvc://models/m", "servedNames": ["a", "b"]},
    "adapters": [{"name": "sql", "uri": "pvc://models/sql"}],
    "engine": {
        "tensorParallelSize": 2, "maxModelLen": 1024, "maxNumSeqs": 8, "maxBatchedTokens": 64, "dtype": "bfloat16",
        "loadFormat": "dummy", "quantization": "fp8",
        "kvCache": {"memoryFraction": 0.5, "blocks": 64, "hostMemory": "1Gi", "dtype": "fp8", "prefixCaching": False},
    },
}  # fmt: skip
A_GROUP = {"model": {"uri": "pvc://models/m"}, "engine": {"pipelineParallelSize": 2}}
IN_A_POD = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "leader"}


@pytest.mark.parametrize("fields", [ONE_POD, A_GROUP, {"model": {"uri": "pvc://models/m"}}])
def test_the_engine_takes_what_the_operator_gives_and_nobody_can_give_it_twice(fields) -> None:
    spec = InferenceServiceSpec.model_validate(fields)
    given = [IN_A_POD.get(word, word) for word in objects.arguments(objects.Owner("demo", "default", "uid"), spec)]
    flags = build_parser().parse_args(given)
    assert engine_config(flags).model.path == "/models/m"
    assert server_config(flags).port == objects.HTTP_PORT
    own = {word for word in given if word.startswith("--")} - USERS_TOO
    assert own - OWNED_FLAGS.keys() == set()


def test_a_flag_that_a_field_owns_is_owned_under_all_its_names() -> None:
    parser = build_parser()
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    assert isinstance(commands, dict)
    for action in commands["serve"]._actions:
        names = set(action.option_strings)
        assert names <= OWNED_FLAGS.keys() or not names & OWNED_FLAGS.keys(), names


def test_every_metric_that_the_control_plane_reads_is_told() -> None:
    known = metrics_page.names()
    for path in OPERATOR.rglob("*.py"):
        for name in re.findall(r"\b((?:vllm|mainsail):[a-z_]+)", path.read_text()):
            told = name in known or f"{name}_total" in known
            assert told or (name.endswith("_") and any(one.startswith(name) for one in known)), f"{path.name}: {name}"


def test_gates_read_metrics_by_labels_that_gateways_give() -> None:
    labels = {metrics_page.wire_name(family): set(names) for family, names in metrics_page.parts()["Gateway"]}
    for name in (GATEWAY_REQUESTS, GATEWAY_FIRST_TOKEN, GATEWAY_INTER_TOKEN):
        assert {"namespace", "service", "revision", "pod"} <= labels[name]
    assert "code" in labels[GATEWAY_REQUESTS]
