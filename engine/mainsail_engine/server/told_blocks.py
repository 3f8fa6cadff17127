"""Which KV blocks a prompt is made of, told in the head of its answer to a gateway that asks.

A gateway routes by text and has no tokenizer; the events of the prefix cache name blocks by hash (kv/events.py). This
joins the two: `x-mainsail-blocks: tell` in a request's head is answered by `x-mainsail-blocks: TOKENS BLOCKS`, with the
number of the prompt's tokens and, in base64, for some of its full blocks, in order, 12 bytes each, big-endian: the
tokens up to its end in 32 bits, and its hash in 64. Only hashes that are multiples of `SAMPLE` are told,
the same that a gateway keeps, and of a long prompt at most `MAX_TOLD` of these, evenly spread. What goes through a LoRA
adapter is not told of: its blocks' names depend on when the adapter was loaded.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence

from starlette.requests import Request

from mainsail_engine.config import BLOCK_SIZE
from mainsail_engine.kv.block_hash import block_hashes
from mainsail_engine.server.serving import Job

BLOCKS_HEADER = "x-mainsail-blocks"
SAMPLE = 4
MAX_TOLD = 128


def blocks_header(request: Request, jobs: list[Job]) -> dict[str, str]:
    """For the answer's head, where it was asked for: of the first prompt."""
    if request.headers.get(BLOCKS_HEADER) != "tell" or not jobs or jobs[0].adapter:
        return {}
    job = jobs[0]
    ends = enumerate(block_hashes(job.prompt_token_ids, job.cache_salt), 1)
    return {BLOCKS_HEADER: packed(len(job.prompt_token_ids), [(number * BLOCK_SIZE, found) for number, found in ends])}


def packed(num_tokens: int, blocks: Sequence[tuple[int, int]]) -> str:
    """The header's value for a prompt's full blocks: of each its end and its hash."""
    told = [block for block in blocks if not block[1] % SAMPLE]
    step = -(-len(told) // MAX_TOLD)
    if step > 1:
        told = told[::-1][::step][::-1]  # the last one in any case: it says most
    content = b"".join(struct.pack(">IQ", end, found) for end, found in told)
    return f"{num_tokens} {base64.b64encode(content).decode()}"
