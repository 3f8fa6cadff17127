"""Make data/smollm2_greedy.json anew: what transformers answers greedily in float32 to the prompts below.

    python tests/engine/model/make_reference.py ~/.cache/mainsail/models/SmolLM2-135M-Instruct.Q4_1.gguf

It takes minutes (transformers dequantizes and converts the GGUF), which is why the answers are kept. Prompts are kept
as token ids, so that the comparison does not depend on a tokenizer. For every generated token the file has the five
best of its position and their log-probabilities: where the first two are nearer than 1e-3, the two implementations may
rightly differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OUTPUT = Path(__file__).parent / "data" / "smollm2_greedy.json"
NUM_TOKENS = 40

CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "Name three planets.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "What does a compiler do?",
    "Tell me a short story about a fox and a lantern.",
]
TEXTS = [
    "The",
    "Once upon a time, in a village by the mountains,",
    "def fibonacci(n):\n",
    "import os\nimport sys\n\ndef main():\n    ",
    "The three laws of motion are",
    "In economics, inflation means",
    "<html>\n<head>\n<title>",
    "SELECT name, price FROM products WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at a lower temperature on a mountain because",
    "A B C D E F G",
    "La capitale de l'Italie est",
    "The ship left the harbour at dawn. " * 40 + "At noon,",
    "One sheep, two sheep, three sheep, four sheep, " * 12,
]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> dict[str, list[Any]]:
    """Tokens, and for each position the five best with their log-probabilities."""
    tokens: list[int] = []
    best: list[list[int]] = []
    logprobs: list[list[float]] = []
    out = model(torch.tensor([prompt]), use_cache=True)
    for _ in range(NUM_TOKENS):
        top = torch.log_softmax(out.logits[0, -1].float(), dim=-1).topk(5)
        tokens.append(int(top.indices[0]))
        best.append(top.indices.tolist())
        logprobs.append([round(value, 5) for value in top.values.tolist()])
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return {"prompt_token_ids": prompt, "token_ids": tokens, "top5": best, "top5_logprobs": logprobs}


def main() -> None:
    path = Path(sys.argv[1]).expanduser()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in CHATS] + TEXTS
    cases = [greedy(model, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    OUTPUT.write_text(json.dumps({"model": path.name, "dtype": "float32", "cases": cases}) + "\n")
    print(f"{len(cases)} cases -> {OUTPUT}")


if __name__ == "__main__":
    main()
