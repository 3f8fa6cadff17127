"""A model of random weights that is made in a second and answers in milliseconds, with a tokenizer and a template.

For tests of the server's behaviour, where what the model says does not matter. Every byte is a token; three more are
special, and every eighth letter of the alphabet is joined to its successor, so that some tokens have two letters.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("a", "b"), ("i", "j"), ("q", "r"), ("y", "z"), ("t", "h"), ("th", "e")]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS, HIDDEN, HEADS, KV_HEADS, WIDE = 2, 32, 4, 2, 48


def make_tiny_model(
    folder: Path, *, max_len: int = 2048, special: list[str] = SPECIAL, template: str = TEMPLATE
) -> Path:
    """A Hugging Face folder. special: ends with what begins a text, what begins a turn and what ends one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(special)
    vocab = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": template, "bos_token": special[-3], "eos_token": special[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "max_position_embeddings": max_len,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
        "hidden_act": "silu", "bos_token_id": vocab - 3, "eos_token_id": vocab - 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocab), folder / "model.safetensors")
    return folder


def _tokenizer(special: list[str]) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + ["".join(pair) for pair in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _weights(vocab: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    kv = KV_HEADS * HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": random(vocab, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": torch.ones(HIDDEN),
            f"{at}post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{at}self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": random(kv, HIDDEN),
            f"{at}self_attn.v_proj.weight": random(kv, HIDDEN),
            f"{at}self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            f"{at}mlp.gate_proj.weight": random(WIDE, HIDDEN),
            f"{at}mlp.up_proj.weight": random(WIDE, HIDDEN),
            f"{at}mlp.down_proj.weight": random(HIDDEN, WIDE),
        }
    return weights
