"""What has to be true of a world whose other ranks are not there, for `memplan dry-run` to run:

    memplan dry-run --steps 1 --gpu 8xh100 -- torchrun --nproc-per-node 8 benchmarks/dry_gpu/ranks.py

Nobody is waited for, and what others send is what this rank sends, on the host and on the card. Without one
(--cpu) it tries the host alone. It ends with an optimizer step, as values.py does.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

on_card = "--cpu" not in sys.argv
if on_card:
    torch.cuda.set_device(0)
    # the communicators of groups are split off this one
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda:0"))
else:
    dist.init_process_group("gloo")
world = dist.get_world_size()
assert (dist.get_rank(), world) == (0, 8)
assert dist.get_backend(dist.new_group(range(4), backend="gloo")) == "gloo"
half = dist.new_group(range(4))
dist.barrier()
dist.monitored_barrier()

for device in ("cpu", "cuda") if on_card else ("cpu",):
    sent = torch.tensor([3, 4], device=device)
    many = [torch.zeros_like(sent) for _ in range(world)]
    dist.all_gather(many, sent)
    assert [one.tolist() for one in many] == [[3, 4]] * world
    flat = torch.zeros(2 * world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(flat, sent)
    assert flat.tolist() == [3, 4] * world
    for op, wanted in (("SUM", [24, 32]), ("MAX", [3, 4]), ("MIN", [3, 4]), ("PRODUCT", [3**8, 4**8])):
        reduced = sent.clone()
        dist.all_reduce(reduced, getattr(dist.ReduceOp, op))
        assert reduced.tolist() == wanted, (op, reduced)
    reduced = sent.clone()
    dist.all_reduce(reduced, group=half)
    assert reduced.tolist() == [12, 16]
    dist.all_reduce(reduced, async_op=True).wait()
    assert reduced.tolist() == [96, 128]
    counts = torch.arange(world, device=device) + 5
    received = torch.zeros_like(counts)
    dist.all_to_all_single(received, counts)
    assert received.tolist() == [5] * world  # each sends its first to rank 0
    part = torch.zeros(1, dtype=torch.int64, device=device)
    dist.reduce_scatter_tensor(part, counts)
    assert part.tolist() == [5 * world]
    dist.scatter(part, [torch.full_like(part, rank + 1) for rank in range(world)])
    assert part.tolist() == [1]
    dist.broadcast(sent, 3)
    assert sent.tolist() == [3, 4]
if on_card:  # whose results are new tensors, and what is sharded
    sent, counts = torch.tensor([3, 4], device="cuda"), torch.arange(world, device="cuda") + 5
    assert functional.all_reduce(sent, "sum", dist.group.WORLD).tolist() == [24, 32]
    assert functional.all_reduce(sent, "max", half).tolist() == [3, 4]
    assert (functional.all_gather_tensor(sent, 0, half) + 1).tolist() == [4, 5] * 4
    assert functional.reduce_scatter_tensor(counts, "sum", 0, dist.group.WORLD).tolist() == [5 * world]
    sharded = distribute_tensor(torch.arange(16), init_device_mesh("cuda", (world,)), [Shard(0)])
    assert sharded.to_local().tolist() == [0, 1]
    assert (sharded * 2 + 1).to_local().tolist() == [1, 3]
    assert sharded.full_tensor().tolist() == [0, 1] * world
    assert bool((sharded < 2).all()) and not bool((sharded > 1).any())
    floats = distribute_tensor(torch.randn(16), init_device_mesh("cuda", (world,)), [Shard(0)])
    assert not bool(((floats < -3) | (floats > 3)).any())
objects: list[object] = [None] * world
dist.all_gather_object(objects, "mine")
assert objects == ["mine"] * world

model: nn.Module = nn.Linear(8, 8, device="cuda" if on_card else "cpu")
if on_card:  # FakeProcessGroup's futures hold nothing, which DDP's reducer would read
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(2, 8, device=next(model.parameters()).device)).sum().backward()
optimizer.step()
