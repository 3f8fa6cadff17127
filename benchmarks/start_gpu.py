"""Starts of `mainsail-engine serve` on one GPU, by phase, and sleeping and waking up.

    python benchmarks/start_gpu.py [--rows cold,warm,ahead] [--folder /dev/shm] [--output FILE]

    cold    no kernel is compiled yet: a process of the start's own compiles them while weights are read
    warm    the same again; then /sleep and /wake_up twice
    ahead   kernels compiled beforehand by `compile-kernels`, in a process that sees no card

A checkpoint of Llama-3-8B's shapes and random bf16 weights (16.1 GB) in memory-backed files: what a disk or a network
adds is left out. Seconds count from the start of the process; phases are what the server's log says of itself. Python's
bytecode is there beforehand, as it is in an image. Goals: first token in 10 s, /sleep and /wake_up together 1.5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from served_gpu import make_model

PORT = 8124
FILES = 8
"""Of the checkpoint."""
TOLD = ("started in", "captured", "weights read", "kernels:", "host memory", "asleep", "awake")
"""Lines of the log that are shown."""
DECODED = 300
"""Tokens of the first long answer: what its steps take shows what still goes on beside them."""


def make_checkpoint(folder: Path) -> Path:
    """Random weights, written by several threads."""
    import torch
    from safetensors.torch import save_file

    make_model(folder)
    shapes = shapes_of(json.loads((folder / "config.json").read_text()))
    parts = [list(shapes)[part::FILES] for part in range(FILES)]

    def write(part: int) -> None:
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16, device="cuda") for name in parts[part]}
        filled = {name: tensor.normal_(0, 0.02).cpu() for name, tensor in tensors.items()}
        save_file(filled, folder / file_name(part))

    with ThreadPoolExecutor(FILES // 2) as pool:
        list(pool.map(write, range(FILES)))
    index = {name: file_name(part) for part, names in enumerate(parts) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def file_name(part: int) -> str:
    return f"model-{part + 1:05d}-of-{FILES:05d}.safetensors"


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A Llama checkpoint's tensors."""
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    found = {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return ends | found | {"lm_head.weight": (vocab, hidden)}


class Server:
    """One start of `serve`, to be ended by `close`."""

    def __init__(self, model: Path, log: Path, flags: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "mainsail_engine.cli", "serve", "--model", str(model), "--port", str(PORT)]
        self._log, self._began_s = log, time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--served-model-name", "bench", *flags], stdout=log.open("wb"), stderr=subprocess.STDOUT,
            env=environment,
        )  # fmt: skip
        while not self._is_ready():
            time.sleep(0.02)
        try:
            self.ask("/v1/completions", {"model": "bench", "prompt": [5, 6, 7], "max_tokens": 1})
        except OSError:  # else it would stay on the card, and on the port of the next
            self.close()
            raise
        self.first_token_s = time.monotonic() - self._began_s

    def _is_ready(self) -> bool:
        if self._process.poll() is not None or time.monotonic() - self._began_s > 180:
            self.close()
            sys.exit(f"the server did not start:\n{self._log.read_text()[-3000:]}")
        try:
            self.ask("/health/ready")
        except OSError:
            return False
        return True

    def ask(self, path: str, body: dict[str, Any] | None = None) -> list[float]:
        """When each line of the answer came. body None: a GET."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [time.monotonic() for line in answer if line.startswith(b"data: {")]

    def timed(self, path: str, body: dict[str, Any]) -> float:
        began_s = time.monotonic()
        self.ask(path, body)
        return time.monotonic() - began_s

    def step_ms(self) -> dict[str, float]:
        """Between the tokens of the first long answer."""
        stream = {"max_tokens": DECODED, "ignore_eos": True, "temperature": 0, "stream": True}
        times = self.ask("/v1/completions", {"model": "bench", "prompt": [5, 6, 7], **stream})
        gaps = sorted(1e3 * (after - before) for before, after in pairwise(times))
        return {"mean": sum(gaps) / len(gaps), "p50": gaps[len(gaps) // 2], "p99": gaps[int(len(gaps) * 0.99)],
                "max": gaps[-1]}  # fmt: skip

    def told(self) -> list[str]:
        """The log's lines about the start, without their heads."""
        lines = self._log.read_text().splitlines()
        return [line.partition("INFO ")[2] for line in lines if any(word in line for word in TOLD)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def start(model: Path, row: str, flags: list[str], cache: Path, *, sleeps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
        server = Server(model, Path(folder) / "serve.log", flags, environment)
        try:
            found: dict[str, Any] = {"first_token_s": server.first_token_s, "step_ms": server.step_ms()}
            turns = [(server.timed("/sleep", {}), server.timed("/wake_up", {})) for _ in range(sleeps)]
            found |= {"sleep_s": [a for a, _ in turns], "wake_up_s": [b for _, b in turns]} if turns else {}
            return found | {"kernels": len(list(cache.glob("*/*.cubin"))), "log": server.told()}
        finally:
            server.close()


def compile_ahead(model: Path, flags: list[str], cache: Path, card: str) -> float:
    """Seconds; in a process that sees no card."""
    began_s = time.monotonic()
    command = [sys.executable, "-m", "mainsail_engine.cli", "compile-kernels", "--model", str(model), "--card", card]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *flags], env=environment, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", default="cold,warm,ahead")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where there is room for the checkpoint")
    parser.add_argument("--card", default="h200", help="for compile-kernels")
    parser.add_argument("--serve-flags", default="--max-model-len 8192")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="noted with the results")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    flags: list[str] = args.serve_flags.split()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "commit": args.commit, "rows": {}}
    model, caches = Path(tempfile.mkdtemp(dir=args.folder)), Path(tempfile.mkdtemp())
    os.environ["PYTHONPYCACHEPREFIX"] = str(caches / "bytecode")
    try:
        import torch

        make_checkpoint(model)
        result |= {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
        torch.cuda.empty_cache()
        for module in ("mainsail_engine.server.run", "mainsail_engine.runner.dry_run", "mainsail_engine.core"):
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        for row in args.rows.split(","):
            cache = caches / ("ahead" if row == "ahead" else "kernels")
            before = {"compiled_in_s": compile_ahead(model, flags, cache, args.card)} if row == "ahead" else {}
            found = start(model, row, flags, cache, sleeps=2 if row == "warm" else 0)
            result["rows"][row] = before | found
            print(f"{row:6} first token {found['first_token_s']:.2f} s", json.dumps(before | found), flush=True)
            if args.output:
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(caches, ignore_errors=True)


if __name__ == "__main__":
    main()
