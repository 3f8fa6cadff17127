"""What the benchmarks of several GPUs share: small random models, tasks in processes of their own, rows that are kept.

A task is a script that calls itself: it prints a line of JSON for each row as it gets it, so that one that fails or
takes too long loses only the rest. Where there is no GPU all of it runs over gloo on the CPU, which shows that a script
works and nothing about speed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDE, EXPERTS = 1024, 256, 4, 8, 4, 64, 512, 8
Row = dict[str, Any]
FAMILIES: dict[str, Row] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "moe_intermediate_size": WIDE // 2, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


class Results:
    """Rows as they come: printed, and written to a file each time."""

    def __init__(self, path: Path | None, **about: Any) -> None:
        self._path, self._rows = path, list[Row]()
        card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        command = " ".join(["python", *sys.argv])
        self._about = {"card": card, "torch": torch.__version__, "commit": os.environ.get("COMMIT", ""),
                       "command": command, **about}  # fmt: skip

    def add(self, row: Row) -> Row:
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        self._rows.append(row)
        if self._path:
            self._path.write_text(json.dumps({**self._about, "rows": self._rows}, indent=1) + "\n")
        return row

    def take(self, task: Task) -> list[Row]:
        """All rows of a task, and one that says so if it did not end well."""
        rows = [self.add(row) for row in task.rows()]
        if task.trouble:
            self.add({"failed": task.name, "how": task.trouble})
        return rows


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


class Task:
    """`script --task name arguments`, begun at once, ended after its time with all that it started."""

    def __init__(self, script: str, name: str, *arguments: str, limit_s: float = 120.0) -> None:
        self.name, self.trouble = f"{name} {' '.join(arguments)}", ""
        command = ["timeout", "-k", "2", str(limit_s), sys.executable, script, "--task", name, *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        signal.signal(signal.SIGTERM, lambda *unused: sys.exit(1))  # so that its end is this process's at the latest
        atexit.register(self._end)

    def rows(self) -> Iterator[Row]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code = self._process.wait()
        if code:
            self.trouble = "took too long" if code in (124, 137) else f"ended with code {code}"
        self._end()

    def _end(self) -> None:
        """All that it started, if anything is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def tell(row: Row) -> None:
    """A row of the task that this process is."""
    print(json.dumps(row), flush=True)


def end_task() -> None:
    """Not by way of the interpreter's end: NCCL's threads wait for ranks that may be gone."""
    sys.stdout.flush()
    os._exit(0)


def make_tiny(folder: Path, family: str = "llama") -> Path:
    """A model of random weights whose choices are clear, and a tokenizer of made-up words."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": _matrix(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    tensors["lm_head.weight"] = _matrix(VOCAB, HIDDEN) * 4
    for layer in range(LAYERS):
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in _layer(family).items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "dtype": "float32", "eos_token_id": 2,
        "tie_word_embeddings": False, **FAMILIES[family],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _matrix(out: int, inputs: int) -> torch.Tensor:
    return torch.randn(out, inputs) * inputs**-0.5


def _layer(family: str) -> dict[str, torch.Tensor]:
    wide, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {
        "self_attn.q_proj.weight": _matrix(wide, HIDDEN), "self_attn.k_proj.weight": _matrix(kv, HIDDEN),
        "self_attn.v_proj.weight": _matrix(kv, HIDDEN), "self_attn.o_proj.weight": _matrix(HIDDEN, wide),
        "input_layernorm.weight": torch.ones(HIDDEN), "post_attention_layernorm.weight": torch.ones(HIDDEN),
    }  # fmt: skip
    if family != "llama":
        tensors |= {f"self_attn.{x}_norm.weight": torch.ones(HEAD_DIM) for x in "qk"}
    if family == "qwen3-moe":
        tensors["mlp.gate.weight"] = _matrix(EXPERTS, HIDDEN) * 4
        for expert in range(EXPERTS):
            tensors |= _mlp(f"mlp.experts.{expert}", WIDE // 2)
        return tensors
    return tensors | _mlp("mlp", WIDE)


def _mlp(at: str, wide: int) -> dict[str, torch.Tensor]:
    return {
        f"{at}.gate_proj.weight": _matrix(wide, HIDDEN),
        f"{at}.up_proj.weight": _matrix(wide, HIDDEN),
        f"{at}.down_proj.weight": _matrix(HIDDEN, wide),
    }
