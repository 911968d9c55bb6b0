"""What has to be true of values on the card that is not there, for `memplan dry-run` to run:

    memplan dry-run --steps 1 --gpu 4090 -- python benchmarks/dry_gpu/values.py

Whole numbers and truth values are those of the host; floats are zero. It ends with an optimizer step, so
that there is an answer; an assertion that fails ends it before.
"""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

card = torch.device("cuda")
ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
labels = torch.where(ids == 0, -100, ids)


def same(on_host: torch.Tensor, on_card: torch.Tensor) -> None:
    assert on_card.is_cuda
    assert on_card.dtype == on_host.dtype
    assert on_card.tolist() == on_host.tolist(), (on_card.tolist(), on_host.tolist())


# elementwise, reductions, factories, views, in place
for compute in (
    lambda it: it * 3 - 1,
    lambda it: it != 0,
    lambda it: (it != 0).sum(),
    lambda it: (it != 0).long().cumsum(-1) - 1,
    lambda it: it.argmax(-1),
    lambda it: it[:, 1:].clamp(min=1).max(),
    lambda it: torch.arange(7, device=it.device) % 3,
    lambda it: it.clone().masked_fill_(it == 0, -100),
    lambda it: torch.cat([it, it.flip(0)], 1),
    lambda it: torch.nn.functional.pad(it, (2, 0), value=9),
    lambda it: (it == 0).all() | (it > 100).any(),
    lambda it: it.gather(1, (it == 0).long()),
):
    same(compute(ids), compute(ids.to(card)))  # type: ignore[no-untyped-call]

# shapes that depend on values
mask, on_card = labels != -100, labels.to(card) != -100
for choose in (
    lambda it, chosen: chosen.nonzero(),
    lambda it, chosen: it[chosen],
    lambda it, chosen: it.masked_select(chosen),
    lambda it, chosen: it.unique(),
    lambda it, chosen: torch.unique_consecutive(it),
    lambda it, chosen: torch.repeat_interleave(chosen.sum(-1)),
    lambda it, chosen: torch.bincount(it.flatten(), minlength=8),
):
    same(choose(ids, mask), choose(ids.to(card), on_card))  # type: ignore[no-untyped-call]
hidden = torch.randn(2, 5, 8, device=card, requires_grad=True)
assert hidden[on_card].shape == (5, 8)
hidden.new_zeros(2, 5).masked_scatter(on_card, hidden[on_card].sum(-1)).sum().backward()
assert hidden.grad is not None and hidden.grad.shape == hidden.shape
assert bool(on_card[0, 0]) and not bool(on_card[0, 4])
assert int(on_card.sum()) == 5

# read back as it lies, and in a thread
assert ids.to(card)[:, 1:].cpu().tolist() == ids[:, 1:].tolist()
assert (labels.to(card)[:, ::2] != -100).cpu().tolist() == (labels[:, ::2] != -100).tolist()
assert torch.equal(ids.to(card), ids.to(card))
seen: list[int] = []


def see() -> None:
    seen.append(int((ids.to(card) * 2).sum()))


class Prefetching(threading.Thread):
    def run(self) -> None:
        see()


for thread in (threading.Thread(target=see), Prefetching()):
    thread.start()
    thread.join()
assert seen == [int(ids.sum()) * 2] * 2

# what the card draws is not drawn by the host's generator
torch.manual_seed(0)
drawn = torch.randint(1 << 20, (4,))
torch.manual_seed(0)
torch.randint(9, (5,), device=card), torch.randperm(5, device=card), ids.to(card).random_(0, 9)
assert torch.equal(drawn, torch.randint(1 << 20, (4,)))

# made on the card by default
torch.set_default_device(card)
assert torch.arange(7).is_cuda and (torch.arange(7) < 5).sum().item() == 5
assert torch.tensor([3, 4]).tolist() == [3, 4] and torch.full((2,), 7)[-1] == 7
torch.set_default_device(None)

# a choice along whichever dimension lies within it
for made in (torch.rand(4, 100, device=card).topk(2, 0), torch.rand(4, 100, device=card).sort(dim=0)):
    assert int(made.indices.max()) < 4

# in what backward recomputes, by itself or asked for gradients
ends = torch.tensor([0, 2, 5]).to(card)


def of_parts(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    parts: list[torch.Tensor] = [part.sum() for part in x.split(ends.diff().tolist())]
    return torch.stack(parts).sum()


def forwarded(x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    """Its sum; what lies in free memory is none of the numbers that it took."""
    made = checkpoint(of_parts, x, ends, use_reentrant=reentrant)
    others = [torch.full((2,), 9, device=card) for _ in range(64)]
    del others
    return made


for reentrant in (False, True):
    x = torch.randn(5, 8, device=card, requires_grad=True)
    forwarded(x, reentrant).backward()
    assert x.grad is not None and x.grad.shape == x.shape
torch.autograd.grad(forwarded(x, False), x)

# nothing of it changes what autograd takes: a gradient is added up in place
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
x = torch.randn(2048, 2048, device=card, requires_grad=True)
y = x * 1
(y[:, 1:].sum() + y[:, :-1].sum()).backward()
assert torch.cuda.max_memory_allocated() - before <= 4 * x.nbytes + (1 << 20)
del x, y

# convolutions go cuDNN's ways, and unfold nothing; what else asks for cuDNN goes those without
x = torch.randn(1, 64, 128, 128, device=card, requires_grad=True)
convolution = nn.Conv2d(64, 64, 3, padding=1, device=card)
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
y = convolution(x)
assert torch.cuda.max_memory_allocated() - before == y.nbytes
y.sum().backward()
for layer in (nn.LSTM, nn.GRU, nn.RNN):
    layer(8, 16, device=card)(torch.randn(5, 2, 8, device=card))[0].sum().backward()
nn.BatchNorm2d(64, device=card)(x).sum().backward()
del x, y

# what is compiled is compiled in one piece, its backward too, and takes what it takes; nobody stands at it
x = torch.randn(512, 512, device=card, requires_grad=True)
compiled = torch.compile(lambda it: ((it * 2 + 1).sin() * 3).exp(), fullgraph=True)
compiled(x)  # compiling takes some, too
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
y = compiled(x)
assert torch.cuda.max_memory_allocated() - before == y.nbytes  # no tensor between
y.sum().backward()
assert x.grad is not None and x.grad.shape == x.shape
same(ids + 1, ids.to(card) + 1)
del x, y

# floats are zero wherever somebody asks, whatever lay in that memory before
stale = torch.full((1000,), -1, device=card)
del stale
loss = torch.randn(1000, device=card).mean()
assert loss.item() == 0.0 and loss.cpu().item() == 0.0
assert bool(torch.isfinite(loss)) and not bool(torch.isnan(loss))
assert torch.randn(3, 4, device=card).cpu().count_nonzero() == 0

# a router spreads tokens evenly
chosen = torch.topk(torch.randn(6, 4, device=card), 2, dim=-1).indices
assert torch.bincount(chosen.flatten(), minlength=4).tolist() == [3, 3, 3, 3]

model = nn.Linear(8, 8, device=card)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(2, 8, device=card)).sum().backward()
optimizer.step()
