"""Decodes' attention beside the prompts': the same numbers as one after the other, whatever the step just wrote."""

import pytest
import torch

from mainsail_engine.model import attention
from mainsail_engine.model.attention import Attention
from mainsail_kernels.attention_decode import decode_workspace, goes_beside
from mainsail_kernels.kv_transpose import room_shape
from mainsail_kernels.rms_norm import rms_norm

HEADS, KV_HEADS, DIM = 32, 8, 128

pytestmark = pytest.mark.gpu


class Step:
    """A layer's attention in a step of decodes and chunks (tokens, context before them), with rows of padding between
    and behind, from the norm before it to the norm behind it."""

    def __init__(
        self, decodes: list[int], chunks: list[tuple[int, int]], padding: int, kind: torch.dtype, transposes: bool
    ) -> None:
        device = torch.device("cuda")
        numbers = torch.Generator().manual_seed(len(decodes))
        lens = [*decodes, *(tokens + before for tokens, before in chunks)]
        blocks = [-(-length // 16) for length in lens]
        order = torch.randperm(sum(blocks), generator=numbers).to(torch.int32).split(blocks)
        tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        owners = [(i, length - 1) for i, length in enumerate(decodes)]
        for i, (tokens, before) in enumerate(chunks, len(decodes)):
            owners += [(i, before + n) for n in range(tokens)]
        owner, position = torch.tensor(owners).T
        n, self.rows = len(decodes), len(owners)
        height = max(self.rows, n + padding)
        behind = (0, height - self.rows)
        slots = tables[owner, position // 16].long() * 16 + position % 16
        starts = torch.tensor([0, *(tokens for tokens, _ in chunks)]).cumsum(0) + n
        lengths = torch.tensor(lens)
        self.workspace = decode_workspace(n + padding, HEADS, KV_HEADS, DIM, device)
        self.attention = Attention(
            positions=torch.nn.functional.pad(position, behind).to(device),
            slot_mapping=torch.nn.functional.pad(slots, behind, value=-1).to(device),
            block_tables=torch.cat([tables[:n], tables[:1].expand(padding, -1), tables[n:]]).to(device),
            chunk_start=starts.to(device, torch.int32),
            seq_lens=torch.cat([lengths[:n], lengths.new_zeros(padding), lengths[n:]]).to(device, torch.int32),
            num_decodes=n + padding,
            max_query_len=max(tokens for tokens, _ in chunks),
            workspace=self.workspace,
        )
        self.kv = torch.randn(sum(blocks), 2, KV_HEADS, 16, DIM, generator=numbers).to(device, kind)
        room = room_shape(self.kv, len(blocks), max(blocks), HEADS, torch.bfloat16) if transposes else None
        self.attention.room = torch.empty(room, device=device, dtype=kind) if room else None
        width = (HEADS + 2 * KV_HEADS) * DIM
        self.inputs = [torch.randn(height, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
        self.cos_sin = torch.randn(max(lens), DIM, device=device)
        self.ones = torch.ones(width, device=device, dtype=torch.bfloat16)

    def run(self, which: int) -> torch.Tensor:
        """Of one of two inputs: other queries, and other keys and values at the same newest positions."""
        qkv = rms_norm(self.inputs[which], self.ones, 1e-6)
        assert isinstance(qkv, torch.Tensor)
        query = self.attention.rotate_and_write(
            qkv, self.kv, self.cos_sin, num_heads=HEADS, num_kv_heads=KV_HEADS, q_norm=None, k_norm=None, eps=1e-6
        )
        out = self.attention.attend(query, self.kv, 0.09).view(len(qkv), -1)
        normed = rms_norm(out, self.ones[: HEADS * DIM], 1e-6)
        assert isinstance(normed, torch.Tensor)
        return normed[: self.rows].clone()


@pytest.mark.parametrize(
    ("kind", "transposes"), [(torch.bfloat16, False), (torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True)]
)
@pytest.mark.parametrize(
    ("decodes", "chunks", "padding"),
    [
        ([1000] * 60, [(192, 700), (256, 0)], 4),
        ([5000] * 3, [(700, 300)], 61),
        ([700, 1, 40], [(40, 9)], 0),
        ([2000] * 200, [(300, 724), (524, 500)], 56),
        ([300] * 5, [(1, 0)], 250),
    ],
)
def test_decodes_beside_prompts_see_what_the_step_wrote(decodes, chunks, padding, kind, transposes, monkeypatch):
    """What begins before its inputs are there has those of the step before, which are others; what is not waited for
    at the end, the norm misses."""
    step = Step(decodes, chunks, padding, kind, transposes)
    query = step.inputs[0][:, : HEADS * DIM].view(-1, HEADS, DIM)
    if not goes_beside(query[: len(decodes)], step.kv, 0, 0.0, None):
        pytest.skip("for Hopper")
    with monkeypatch.context() as apart:
        apart.setattr(attention, "goes_beside", lambda *_: False)
        truth = [step.run(which) for which in range(2)]
    seen = [step.run(turn % 2) for turn in range(16)]
    for turn, result in enumerate(seen):
        assert torch.equal(result, truth[turn % 2])
    assert not step.workspace.counters.any()
