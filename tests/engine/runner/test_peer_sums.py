"""Sums over symmetric memory on GPUs: two processes, which share a GPU where there is but one; and NCCL in graphs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mainsail_engine.runner.distributed import RankParallel
from mainsail_engine.runner.peer_sums import PeerSums
from mainsail_engine.runner.sleep import move_tensors

ROOT = Path(__file__).parents[3]
HEAD = """
import sys, torch, torch.distributed as dist
from mainsail_engine.runner.distributed import join, listen
from mainsail_engine.runner.peer_sums import PeerSums, peer_sums
torch.manual_seed(7)
"""
SUMS = """
rank, place = int(sys.argv[1]), sys.argv[2]
device = torch.device("cuda", rank % torch.cuda.device_count())
torch.cuda.set_device(device)
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
shot = peer_sums(device, dist.group.WORLD, 16 << 20)
assert shot is not None
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((1, 256), (3, 4096), (32, 4096), (77, 4096), (512, 4096)):
        parts = torch.randn(2, *shape).to(dtype).to(device)
        truth = parts[0] + parts[1]
        for _ in range(2):  # the second right behind the first, in the same memory
            summed = shot.sum(parts[rank])
        torch.testing.assert_close(summed, truth, rtol=0, atol=0)
x = parts[rank].clone()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    y = shot.sum(shot.sum(x) / 2)  # of what is the same on both: itself, twice
for turn in (1.0, 3.0):
    x.copy_(parts[rank] * turn)
    dist.barrier()
    graph.replay()
    torch.testing.assert_close(y, truth * turn, rtol=1e-6, atol=1e-6)
print("sums are right", flush=True)
"""
ALONE = """
import os, threading, time
rank, place = int(sys.argv[1]), sys.argv[2]
device = torch.device("cuda", rank % torch.cuda.device_count())
torch.cuda.set_device(device)
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
shot = peer_sums(device, dist.group.WORLD)
x = torch.ones(4, 4096, device=device)
shot.sum(x)
torch.cuda.synchronize()
dist.barrier()
if rank == 1:
    os._exit(9)
done = torch.cuda.Event()
shot.sum(x)  # waits on the device, for good
done.record()
threading.Timer(1.0, lambda: (print("ends at", time.time(), flush=True), os._exit(1))).start()
done.synchronize()
print("the sum of a rank that is gone was computed", flush=True)
"""
NCCL = """
parallel = join(0, 1, torch.device("cuda", 0), listen(1))
x = torch.full((4, 64), 2.0, device="cuda")
dist.all_reduce(x)
graph = torch.cuda.CUDAGraph()
out = torch.empty_like(x)
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    for _ in range(200):
        dist.all_reduce(x)
    dist.all_gather_into_tensor(out, x)
graph.replay()
assert (out == 2.0).all() and parallel.smallest(5) == 5 and peer_sums(parallel.device, dist.group.WORLD) is not None
print("graphs hold NCCL's work", flush=True)
"""


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels"))
    environment = os.environ | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", HEAD + script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.gpu
def test_two_processes_sum_by_reading_one_another(tmp_path: Path) -> None:
    ranks = [run(SUMS, str(rank), str(tmp_path / "store")) for rank in range(2)]
    told = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert all("sums are right" in words for words in told), "\n".join(told)


@pytest.mark.gpu
def test_a_rank_ends_at_once_while_its_kernel_waits_for_one_that_is_gone(tmp_path: Path) -> None:
    """As the core does when its watcher says so: the main thread waits for the device, another one ends the process."""
    ranks = [run(ALONE, str(rank), str(tmp_path / "store")) for rank in range(2)]
    told = ranks[0].communicate(timeout=90)[0]
    ended_s = time.time()
    assert [rank.wait(timeout=30) for rank in ranks] == [1, 9], told
    assert "was computed" not in told
    assert ended_s - float(told.rpartition("ends at ")[2]) < 4


@pytest.mark.gpu
def test_graphs_hold_what_nccl_does_beside_its_watchdog() -> None:
    told = run(NCCL).communicate(timeout=90)[0]
    assert "graphs hold NCCL's work" in told, told


def test_what_the_kernel_takes() -> None:
    """Words of 16 bytes, of the types that it knows, and no more than there is memory for."""
    shot = PeerSums(torch.empty(1024, dtype=torch.uint8), "0")
    rows = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert shot.takes(rows)
    assert not shot.takes(torch.zeros(9, 64, dtype=torch.bfloat16))
    assert not shot.takes(rows.half())
    assert not shot.takes(rows[:, :3].contiguous()[:1])
    assert not shot.takes(rows.view(-1)[1:9])
    assert not shot.takes(rows[:0])


def test_a_sleep_leaves_what_the_others_read_where_it_is() -> None:
    buffer = torch.ones(64, dtype=torch.uint8)
    parallel = RankParallel(1, 2, peers=PeerSums(buffer, "0"))
    assert move_tensors([parallel, torch.ones(3)], torch.zeros_like) == 12
    assert parallel.peers is not None
    assert parallel.peers.buffer is buffer
    assert buffer.all()
