"""The caching allocator: what PyTorch's source and documentation say of it, and invariants.

A case is a little program: "a 3M" allocates 3 MiB under the name a, "-a" frees it, "empty" empties the cache.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.asked.alloc_conf import AllocatorSettings, parse_settings
from memplan.device.allocator import MIB, Allocator, Block, OutOfMemory

UNITS = {"B": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30}


def played(program: str, conf: str = "", **bounds: int) -> Allocator:
    allocator = Allocator(parse_settings(conf), **bounds)  # type: ignore[arg-type]
    names: dict[str, Block] = {}
    for line in program.split(";"):
        match line.split():
            case ["empty"]:
                allocator.empty_cache()
            case [name] if name.startswith("-"):
                allocator.free(names.pop(name[1:]))
            case [name, size]:
                names[name] = allocator.malloc(int(float(size[:-1]) * UNITS[size[-1]]))
            case _:
                raise ValueError(line)
    return allocator


def layout(allocator: Allocator) -> list[str]:
    """Segments as text: MiB in use, or in parentheses if free."""

    def text(size: int, used: bool) -> str:
        number = f"{size / MIB:g}"
        return number if used else f"({number})"

    return [" ".join(text(size, used) for size, used in segment.blocks) for segment in allocator.segments()]


@pytest.mark.parametrize(
    ("program", "reserved", "allocated"),
    [
        ("a 1B", 2 * MIB, 512),  # kMinBlockSize, kSmallBuffer
        ("a 513B", 2 * MIB, 1024),
        ("a 1M", 2 * MIB, MIB),  # kSmallSize is small still
        ("a 1.0005M", 20 * MIB, MIB + 1024),  # kLargeBuffer
        ("a 9.99M", 20 * MIB, 10475520),
        ("a 10M", 10 * MIB, 10 * MIB),  # kMinLargeAlloc: a segment of its own, rounded to kRoundLarge
        ("a 11M", 12 * MIB, 12 * MIB),  # 1 MiB is left: too little to split off, so it counts
        ("a 10.9M", 12 * MIB, int(10.9 * MIB + 511) // 512 * 512),  # 1.1 MiB are split off
        ("a 19M", 20 * MIB, 20 * MIB),
        ("a 1M; b 1M; c 1M", 4 * MIB, 3 * MIB),
        ("a 1M; -a; b 1.5M", 22 * MIB, int(1.5 * MIB)),  # small segments are not for large requests
        ("a 30M; -a; b 12M; c 18M", 30 * MIB, 30 * MIB),
        ("a 30M; -a; empty; b 12M", 12 * MIB, 12 * MIB),
        ("a 30M; -a; b 2M; empty", 30 * MIB, 2 * MIB),  # something lies in it: it stays
    ],
)
def test_sizes(program: str, reserved: int, allocated: int) -> None:
    allocator = played(program)
    assert (allocator.reserved, allocator.allocated) == (reserved, allocated)


@pytest.mark.parametrize(
    ("program", "segments"),
    [
        # best fit: the smallest that is large enough, not the first
        ("a 40M; b 30M; -a; -b; c 20M", ["(40)", "20 (10)"]),
        # of equal ones the lowest address
        ("a 30M; b 30M; -b; -a; c 30M", ["30", "(30)"]),
        # neighbours merge, whichever is freed first, but not across segments
        ("a 40M; -a; b 8M; c 8M; d 24M; -b; -d; -c", ["(40)"]),
        ("a 20M; b 20M; -a; -b; c 40M", ["(20)", "(20)", "40"]),
        ("a 40M; -a; b 8M; c 8M; -b", ["(8) 8 (24)"]),
    ],
)
def test_layout(program: str, segments: list[str]) -> None:
    assert layout(played(program)) == segments


def test_out_of_memory_comes_after_cached_segments_were_given_back() -> None:
    allocator = played("a 60M; -a; b 2M; c 50M", capacity=110 * MIB)
    assert allocator.retries == 0  # b lies in a's segment and c in one of its own
    allocator = played("a 60M; -a; c 80M", capacity=100 * MIB)
    assert (allocator.retries, allocator.reserved, allocator.peak_reserved) == (1, 80 * MIB, 80 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        played("a 60M; -a; b 2M; c 80M", capacity=100 * MIB)
    assert (caught.value.requested, caught.value.reserved) == (80 * MIB, 60 * MIB)


def test_a_limit_is_kept_like_the_card_s_end() -> None:
    # set_per_process_memory_fraction: total_allocated_memory + size > allowed_memory_maximum
    assert played("a 60M; b 40M", limit=100 * MIB).reserved == 100 * MIB
    with pytest.raises(OutOfMemory):
        played("a 60M; b 42M", limit=100 * MIB)


def test_max_split_size_keeps_large_blocks_whole() -> None:
    # "prevents the native allocator from splitting blocks larger than this size" (notes/cuda.rst)
    assert layout(played("a 100M; -a; b 30M", "max_split_size_mb:64")) == ["(100)", "30"]
    assert layout(played("a 100M; -a; b 90M", "max_split_size_mb:64")) == ["100"]
    # an oversized block may be 20 MiB too large, no more (max_non_split_rounding_mb)
    assert layout(played("a 100M; -a; b 80M", "max_split_size_mb:64")) == ["(100)", "80"]
    assert layout(played("a 100M; -a; b 80M", "max_split_size_mb:64,max_non_split_rounding_mb:30")) == ["100"]


def test_max_split_size_frees_only_what_is_needed() -> None:
    # release_available_cached_blocks: the smallest oversized block that will do, or the largest ones
    program = "a 100M; b 200M; -a; -b; c 150M"
    assert layout(played(program, "max_split_size_mb:64", capacity=300 * MIB)) == ["(100)", "150"]
    assert played(program, "max_split_size_mb:64", capacity=300 * MIB).retries == 0


def test_roundup_power2_divisions() -> None:
    # notes/cuda.rst: 1200 bytes with 4 divisions lie between 1024 and 2048 in steps of 256: 1280
    allocator = Allocator(AllocatorSettings(roundup=(4,) * 16))
    assert allocator.round_size(1200) == 1536  # below 512 x 4 it is the multiple of 512
    assert allocator.round_size(1200 * 1024) == 1280 * 1024
    assert allocator.round_size(1024 * 1024) == 1024 * 1024
    assert allocator.round_size(1025 * 1024) == 1280 * 1024


def test_garbage_collection_works_with_a_limit_only() -> None:
    program = "a 30M; -a; b 40M; -b; c 50M; -c; d 60M"
    conf = "garbage_collection_threshold:0.5"
    assert played(program, conf, capacity=400 * MIB).reserved == 180 * MIB
    assert played(program, conf, limit=400 * MIB).reserved == 180 * MIB  # below the threshold
    # 120 of 200 MiB are above it: the block that was longest unused goes, before d is asked for
    assert played(program, conf, limit=200 * MIB).reserved < 180 * MIB


def test_large_segment_size() -> None:
    assert played("a 2M", "large_segment_size_mb:32").reserved == 32 * MIB


# -- expandable segments -----------------------------------------------------------------------------


def test_an_expandable_segment_grows_by_pages() -> None:
    conf = "expandable_segments:True"
    assert played("a 1B", conf).reserved == 2 * MIB
    assert played("a 2M", conf).reserved == 20 * MIB
    assert played("a 30M", conf).reserved == 40 * MIB
    allocator = played("a 30M; b 30M; c 30M", conf)
    assert layout(allocator) == ["30 30 30 (10)"]
    assert allocator.allocated == 90 * MIB  # every rest is split off


def test_an_expandable_segment_reuses_what_segments_cannot() -> None:
    program = "a 30M; b 30M; -a; -b; c 60M"
    assert played(program).reserved == 120 * MIB
    assert played(program, "expandable_segments:True").reserved == 60 * MIB


def test_an_expandable_segment_extends_a_free_end() -> None:
    # find_expandable_block: free memory at the end counts towards the request
    assert layout(played("a 30M; b 30M; -b; c 100M", "expandable_segments:True")) == ["30 100 (10)"]


def test_whole_pages_of_an_expandable_segment_can_be_given_back() -> None:
    allocator = played("a 30M; b 70M; c 15M; -b; empty", "expandable_segments:True")
    # b lies from 30 to 100; pages from 40 to 100 are free
    assert allocator.reserved == 120 * MIB - 60 * MIB
    assert layout(allocator) == ["30 (10)", "15 (5)"]


def test_an_expandable_segment_runs_out_with_the_card() -> None:
    allocator = played("a 60M; -a; b 95M", "expandable_segments:True", capacity=100 * MIB)
    assert (allocator.reserved, allocator.retries) == (100 * MIB, 0)
    with pytest.raises(OutOfMemory):
        played("a 60M; b 50M", "expandable_segments:True", capacity=100 * MIB)


def test_pages_may_go_beyond_the_limit_that_a_request_keeps() -> None:
    # alloc_block compares the request with allowed_memory_maximum; map_block then maps whole pages
    conf = "expandable_segments:True"
    assert played("a 60M; b 30M", conf, limit=95 * MIB).reserved == 100 * MIB
    with pytest.raises(OutOfMemory):
        played("a 60M; b 36M", conf, limit=95 * MIB)


def test_a_request_beyond_any_card_is_served_where_nothing_limits_it() -> None:
    assert played("a 2000G", "expandable_segments:True").reserved >= 2000 << 30
    with pytest.raises(OutOfMemory):
        played("a 2000G", "expandable_segments:True", capacity=100 * MIB)


def test_an_oversized_block_of_an_expandable_segment_is_not_released_whole() -> None:
    # release_available_cached_blocks passes over expandable segments; release_cached_blocks unmaps them
    conf = "expandable_segments:True,max_split_size_mb:64"
    allocator = played("a 70M; b 2M; -a; c 100M", conf, capacity=140 * MIB)
    assert (allocator.retries, layout(allocator)) == (1, ["(10) 2 (8)", "100"])


# -- invariants --------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(MIB, 100 * MIB))
PROGRAMS = st.lists(
    st.one_of(SIZES, st.integers(-40, -1), st.just(0)), min_size=1, max_size=120
)  # a size to allocate, a live block to free (by position), or the cache to empty
CONFS = st.sampled_from(
    [
        "",
        "max_split_size_mb:20",
        "expandable_segments:True,max_split_size_mb:20",
        "expandable_segments:True",
        "roundup_power2_divisions:8",
        "large_segment_size_mb:40",
    ]
)


@settings(max_examples=200, deadline=None)
@given(PROGRAMS, CONFS)
def test_segments_tile_and_totals_add_up(program: list[int], conf: str) -> None:
    allocator = Allocator(parse_settings(conf))
    live: list[Block] = []
    for step in program:
        if step > 0:
            live.append(allocator.malloc(step))
            assert live[-1].size >= step
        elif step < 0 and live:
            allocator.free(live.pop(step % len(live)))
        elif step == 0:
            allocator.empty_cache()
        segments = list(allocator.segments())
        assert sum(segment.size for segment in segments) == allocator.reserved
        assert sum(size for s in segments for size, used in s.blocks if used) == allocator.allocated
        assert allocator.allocated == sum(block.size for block in live)
        assert allocator.reserved <= allocator.peak_reserved
        ends = sorted((s.address, s.address + s.size) for s in segments)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        for segment in segments:  # free neighbours are one block
            assert not any(not a[1] and not b[1] for a, b in pairwise(segment.blocks))
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.allocated) == (0, 0)


class Naive:
    """The same allocator without its data structures: segments as lists of [size, used], searched from one
    end to the other. Default settings, one stream."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list[object]]]] = []

    def malloc(self, size: int) -> list[object]:
        size = max((size + 511) // 512 * 512, 512)
        small = size <= MIB
        free = [
            (block[0], number, place)
            for number, (kind, blocks) in enumerate(self.segments)
            for place, block in enumerate(blocks)
            if kind is small and not block[1] and block[0] >= size  # type: ignore[operator]
        ]
        if free:
            _, number, place = min(free)  # type: ignore[type-var]
        else:
            needed = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append((small, [[needed, False]]))
            number, place = len(self.segments) - 1, 0
        blocks = self.segments[number][1]
        block = blocks[place]
        rest = block[0] - size  # type: ignore[operator]
        if rest >= 512 if small else rest > MIB:
            block[0] = size
            blocks.insert(place + 1, [rest, False])
        block[1] = True
        return block

    def free(self, block: list[object]) -> None:
        block[1] = False
        for _, blocks in self.segments:
            place = next((i for i, other in enumerate(blocks) if other is block), None)
            if place is None:
                continue
            if place + 1 < len(blocks) and not blocks[place + 1][1]:
                block[0] += blocks.pop(place + 1)[0]  # type: ignore[operator]
            if place > 0 and not blocks[place - 1][1]:
                block[0] += blocks.pop(place - 1)[0]  # type: ignore[operator]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(SIZES, st.integers(-40, -1)), min_size=1, max_size=150))
def test_it_is_the_naive_allocator(program: list[int]) -> None:
    fast, naive = Allocator(), Naive()
    live: list[tuple[Block, list[object]]] = []
    for step in program:
        if step > 0:
            live.append((fast.malloc(step), naive.malloc(step)))
        elif live:
            ours, theirs = live.pop(step % len(live))
            fast.free(ours)
            naive.free(theirs)
        ours_now = sorted(list(map(list, segment.blocks)) for segment in fast.segments())
        assert ours_now == sorted(blocks for _, blocks in naive.segments)


def test_streams_do_not_share() -> None:
    allocator = Allocator()
    block = allocator.malloc(30 * MIB, stream=1)
    allocator.free(block)
    allocator.malloc(30 * MIB, stream=2)
    assert allocator.reserved == 60 * MIB
    allocator.malloc(30 * MIB, stream=1)
    assert allocator.reserved == 60 * MIB


@settings(max_examples=300, deadline=None)
@given(PROGRAMS, CONFS, st.one_of(st.none(), st.integers(20, 2000)), st.booleans())
def test_a_stretch_of_events_is_its_requests_one_by_one(
    program: list[int], conf: str, capacity: int | None, limited: bool
) -> None:
    bounds = {} if capacity is None else {"limit" if limited else "capacity": capacity * MIB}
    seen: list[list[object]] = []
    for in_a_row in (True, False):
        allocator = Allocator(parse_settings(conf), **bounds)  # type: ignore[arg-type]
        changes: list[tuple[int, int]] = []
        allocator.on_segment = lambda *change, changes=changes: changes.append(change)  # type: ignore[misc]
        live: dict[int, Block] = {}
        sizes: list[int] = []
        there: list[int] = []
        stretch: list[int] = []
        try:
            for step in [*program, 0]:
                if step > 0:
                    there.append(len(sizes))
                    stretch.append(len(sizes))
                    sizes.append(step)
                elif step < 0 and there:
                    stretch.append(~there.pop(step % len(there)))
                elif step == 0:
                    if in_a_row:
                        allocator.play(stretch, sizes, live)
                    for event in [] if in_a_row else stretch:
                        if event >= 0:
                            live[event] = allocator.malloc(sizes[event])
                        else:
                            allocator.free(live.pop(~event))
                    stretch = []
                    allocator.empty_cache()
        except OutOfMemory:
            changes.append((-1, -1))
        totals = allocator.allocated, allocator.peak_allocated, allocator.retries
        seen.append([list(allocator.segments()), totals, changes])
    assert seen[0] == seen[1]


def test_a_stretch_says_which_event_ran_out() -> None:
    allocator = Allocator(capacity=50 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.play([0, ~0, 1, 2, 3], [30 * MIB, 30 * MIB, 20 * MIB, 512], {})
    assert allocator.position == 4
    assert (allocator.allocated, allocator.peak_allocated) == (50 * MIB, 50 * MIB)
