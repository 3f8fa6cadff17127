"""LoRA adapters over HTTP: named by `model`, loaded and unloaded while others stream, apart in the prefix cache."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file
from tests.engine.server.conftest import Engine, launch, start
from tests.engine.server.streams import Seen, watch
from tests.engine.tiny import HIDDEN, LAYERS, make_tiny_model

PROMPT = "The quick brown fox jumps over the lazy dog and then it sleeps in the sun"


def make_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """As PEFT writes them (tests/engine/model/test_lora.py has real ones): random, and strong enough to be seen."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        at = f"base_model.model.model.layers.{layer}.self_attn"
        for module in ("q_proj", "o_proj"):
            tensors[f"{at}.{module}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=random)
            tensors[f"{at}.{module}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_model(folder / "tiny")
    for seed, name in enumerate(("pirate", "poet", "third"), 1):
        make_adapter(folder / name, seed)
    make_adapter(folder / "wide", 9, rank=32)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one API process", "two"])
def adapted(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    engine = start(
        folder, folder / "tiny", "--max-loras", "2", "--lora-modules", f"pirate={folder / 'pirate'}",
        "--kv-cache-blocks", "512", "--max-num-seqs", "16", "--api-server-count", str(request.param),
    )  # fmt: skip
    yield engine
    engine.close()


def complete(engine: Engine, model: str, prompt: str = PROMPT, tokens: int = 24) -> str:
    answer = engine.post("/v1/completions", model=model, prompt=prompt, max_tokens=tokens, temperature=0,
                         ignore_eos=True)  # fmt: skip
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def models(engine: Engine) -> dict[str, str | None]:
    return {card["id"]: card["parent"] for card in engine.http.get(engine.url + "/v1/models").json()["data"]}


def load(engine: Engine, name: str, path: Path) -> int:
    return engine.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path)).status_code


def unload(engine: Engine, name: str) -> int:
    return engine.post("/v1/unload_lora_adapter", lora_name=name).status_code


def test_an_adapter_is_a_model_by_name(adapted: Engine) -> None:
    assert models(adapted) == {"smol": None, "other": None, "pirate": "smol"}
    assert complete(adapted, "pirate") != complete(adapted, "smol")
    missing = adapted.post("/v1/completions", model="poet", prompt="x")
    assert missing.status_code == 404
    assert "served: smol, other, pirate" in missing.json()["error"]["message"]


def test_loaded_and_unloaded_beside_streams(adapted: Engine, folder: Path) -> None:
    """Every answer equals the one that it gets alone, whatever is loaded, unloaded or asked meanwhile."""
    alone = {name: complete(adapted, name, tokens=60) for name in ("smol", "pirate")}
    stop = threading.Event()

    def ask(name: str) -> int:
        count = 0
        while not stop.is_set():
            assert complete(adapted, name, tokens=60) == alone[name]
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, name) for name in ("smol", "pirate", "smol", "pirate")]
        answers = set()
        for _ in range(5):
            assert load(adapted, "poet", folder / "poet") == 200
            assert models(adapted)["poet"] == "smol"
            answers.add(complete(adapted, "poet"))
            assert unload(adapted, "poet") == 200
            assert "poet" not in models(adapted)
        stop.set()
        assert all(future.result() for future in asking)
    assert len(answers) == 1
    assert not answers & {complete(adapted, "smol"), complete(adapted, "pirate")}


async def test_endpoint_pickers_see_which_adapters_run_and_wait(
    adapted: Engine, folder: Path, waiting: Callable[..., None]
) -> None:
    """By any API process: whichever answers the scrape."""

    def seen() -> set[tuple[str, str, str]]:
        texts = [httpx.get(adapted.url + "/metrics", timeout=240).text for _ in range(8)]
        families = [family for text in texts for family in text_string_to_metric_families(text)]
        samples = [family.samples for family in families if family.name == "vllm:lora_requests_info"]
        assert [len(each) for each in samples] == [1] * 8
        labels = [each[0].labels for each in samples]
        return {(of["max_lora"], of["waiting_lora_adapters"], of["running_lora_adapters"]) for of in labels}

    assert load(adapted, "poet", folder / "poet") == 200
    await asyncio.to_thread(waiting, lambda: seen() == {("2", "", "")}, "nobody to be left of earlier requests")
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}

    def stream(model: str) -> asyncio.Task[Seen]:
        return asyncio.create_task(watch(adapted.url, "/v1/completions", {**body, "model": model}))

    streams = [stream("poet") for _ in range(20)]
    try:
        await asyncio.to_thread(waiting, lambda: seen() == {("2", "poet", "poet")}, "poets to run and to wait")
        streams.append(stream("pirate"))
        await asyncio.to_thread(waiting, lambda: seen() == {("2", "pirate,poet", "poet")}, "a pirate to wait")
    finally:
        for each in streams:
            each.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(waiting, lambda: seen() == {("2", "", "")}, "nobody to be left")
    assert unload(adapted, "poet") == 200


def test_prefixes_are_shared_within_an_adapter_only(adapted: Engine, folder: Path) -> None:
    prompt = "a prefix that is long enough for several blocks of the cache, " * 3

    def cached(model: str) -> int:
        answer = adapted.post("/v1/completions", model=model, prompt=prompt, max_tokens=1)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("smol") == 0
    assert cached("pirate") == 0
    assert cached("pirate") > 100
    assert load(adapted, "poet", folder / "poet") == 200
    assert cached("poet") == 0
    assert cached("poet") > 100
    assert unload(adapted, "poet") == 200
    assert load(adapted, "poet", folder / "third") == 200
    assert cached("poet") == 0, "KV of another adapter that once had this name"
    assert unload(adapted, "poet") == 200


def test_an_unloaded_adapter_finishes_what_it_began(adapted: Engine, folder: Path) -> None:
    assert load(adapted, "poet", folder / "poet") == 200
    alone = complete(adapted, "poet", tokens=400)
    with adapted.http.stream(
        "POST", adapted.url + "/v1/completions",
        json={"model": "poet", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True,
              "stream": True},
    ) as stream:  # fmt: skip
        lines = stream.iter_lines()
        text = [json.loads(next(lines)[6:])["choices"][0]["text"]]
        assert unload(adapted, "poet") == 200
        full = adapted.post("/v1/load_lora_adapter", lora_name="third", lora_path=str(folder / "third"))
        assert full.status_code in (200, 400), "its slot is taken until it has finished"
        data = [line[6:] for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        text += [json.loads(line)["choices"][0]["text"] for line in data[:-1]]
    assert "".join(text) == alone
    if full.status_code == 400:
        assert "there are 2 adapters already, and no place for more" in full.json()["error"]["message"]
        assert load(adapted, "third", folder / "third") == 200
    assert complete(adapted, "third") not in (alone[:24], complete(adapted, "pirate"))
    assert unload(adapted, "third") == 200


def test_what_is_wrong_is_said(adapted: Engine, folder: Path) -> None:
    def said(name: str, path: str | Path) -> str:
        answer = adapted.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path))
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "has no adapter_config.json" in said("nobody", "/nowhere")
    assert "rank 32; --max-lora-rank is 16" in said("wide", folder / "wide")
    assert "there is an adapter 'pirate' already" in said("pirate", folder / "pirate")
    assert "is the base model's name" in said("smol", folder / "poet")
    assert unload(adapted, "nobody") == 404
    assert adapted.post("/v1/load_lora_adapter", lora_name="x").status_code == 400
    assert complete(adapted, "pirate") != complete(adapted, "smol")


@pytest.mark.parametrize("adapted", [1], indirect=True)
def test_more_adapters_than_places_on_the_device(adapted: Engine, folder: Path, tmp_path: Path) -> None:
    """Three take turns in one slot, each asked again and again at once: each text as that of an adapter with a slot."""
    names = ("pirate", "poet", "third")
    expected = {"pirate": complete(adapted, "pirate")}
    for name in names[1:]:
        assert load(adapted, name, folder / name) == 200
        expected[name] = complete(adapted, name)
        assert unload(adapted, name) == 200
    modules = [f"{name}={folder / name}" for name in names]
    crowded = start(tmp_path, folder / "tiny", "--max-loras", "1", "--max-cpu-loras", "3", "--lora-modules", *modules,
                    "--kv-cache-blocks", "512", "--max-num-seqs", "16")  # fmt: skip
    try:
        with ThreadPoolExecutor(9) as pool:
            answers = list(pool.map(lambda name: (name, complete(crowded, name)), names * 6))
        assert all(text == expected[name] for name, text in answers)
        assert load(crowded, "fourth", folder / "poet") == 400
    finally:
        crowded.close()


def test_without_the_flag_there_are_no_adapters(engine: Engine, folder: Path) -> None:
    answer = engine.post("/v1/load_lora_adapter", lora_name="poet", lora_path=str(folder / "poet"))
    assert answer.status_code == 400
    assert "--enable-lora" in answer.json()["error"]["message"]


def test_a_wrong_adapter_ends_the_start(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    for modules, words in (
        (f"bad={tmp_path}", "has no adapter_config.json"),
        ("bad", "--lora-modules takes NAME=PATH"),
    ):
        engine = launch(tmp_path, "--model", str(tmp_path / "tiny"), "--lora-modules", modules)
        assert engine.wait() == 1
        assert words in engine.termination_log.read_text()
        engine.close()


@pytest.mark.parametrize("adapted", [1], indirect=True)
def test_two_ranks_give_the_same_text(adapted: Engine, folder: Path, tmp_path: Path) -> None:
    """Also of an adapter that is loaded later."""
    ranks = start(tmp_path, folder / "tiny", "--max-loras", "2", "--lora-modules", f"pirate={folder / 'pirate'}",
                  "--kv-cache-blocks", "512", "--tensor-parallel-size", "2")  # fmt: skip
    try:
        assert load(ranks, "poet", folder / "poet") == 200
        assert load(adapted, "poet", folder / "poet") == 200
        for name in ("smol", "pirate", "poet"):
            assert complete(ranks, name) == complete(adapted, name)
        assert unload(adapted, "poet") == 200
    finally:
        ranks.close()
