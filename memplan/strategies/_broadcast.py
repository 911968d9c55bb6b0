"""Parameters on their way from the first rank to the others, in flat tensors (csrc/distributed/c10d/comm.cpp,
``broadcast_coalesced``, torch 2.13)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memplan.weights import LoadStep, Temporary

LIMIT = 250 << 20  # bytes: DistributedDataParallel.broadcast_bucket_size, PARAM_BROADCAST_BUCKET_SIZE


def coalesced(sizes: Iterable[int], temporary: Temporary) -> Iterator[LoadStep]:
    """Tensors of one dtype and of so many bytes."""
    buckets, nbytes, count = [], 0, 0
    for size in sizes:
        nbytes, count = nbytes + size, count + 1
        if nbytes >= LIMIT:
            buckets.append((nbytes, count))
            nbytes = count = 0
    if count:
        buckets.append((nbytes, count))
    return flying(buckets, temporary)


def flying(buckets: Iterable[tuple[int, int]], temporary: Temporary) -> Iterator[LoadStep]:
    """Buckets, as bytes and how many tensors each has, two at a time."""
    sent: list[int | None] = []
    for nbytes, count in buckets:
        number = None
        if count > 1:  # a single one is flat as it lies
            take, number = temporary(nbytes)
            yield take
        sent.append(number)
        if len(sent) == 2:
            yield from _landed(sent.pop(0))
    for number in sent:
        yield from _landed(number)


def _landed(number: int | None) -> Iterator[LoadStep]:
    if number is not None:
        yield "drop", number
